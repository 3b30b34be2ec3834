"""`pipeline analyze`: read a split of a cache once with a transcoder and publish tables about its features.

Runs no language model: its weights are read for what they alone tell, unless it is left out, and are gone before rows
are read. The transcoder may come from another cache than the one read, as long as both hold the same
site of the same model: what matters is what the numbers are, not which rows were trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tailrace.analysis.dashboards.feature_card import FeatureCard
from tailrace.analysis.harvest.activations import LAST_ROW
from tailrace.analysis.harvest.one_pass import Plan
from tailrace.analysis.harvest.table import WrittenTables, write_tables
from tailrace.analysis.tables import TABLES
from tailrace.analysis.tables.documents import write as write_documents
from tailrace.pipeline.analyze.analysis_pass import (
    AnalysisPass,
    check_workers,
    cost_line,
    estimated_pairs,
    refuse_too_much,
    scratch_folder,
    with_density,
)
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.sources import FreshRows, Source, SplitRows
from tailrace.pipeline.analyze.weight_tables import (
    CONNECTIONS,
    Downstream,
    FromWeights,
    SharedWeights,
    check_downstream,
    later_problems,
    write_weight_tables,
)
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer, layers_of, open_transcoders
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.stage import Made, open_draft, publish_stage
from tailrace.storage.activation_cache import ActivationCache, reopen_cache
from tailrace.storage.artifact import MANIFEST
from tailrace.storage.cache_format import Site
from tailrace.storage.display import card
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.formats import TABLES_KIND
from tailrace.storage.generations import CachePath
from tailrace.storage.names import LOCK
from tailrace.storage.tables import TablesManifest, read_table
from tailrace.training.architectures.transcoder import Transcoder

KIND = TABLES_KIND

logger = logging.getLogger(__name__)


def plan_of(settings: AnalyzeSettings) -> Plan:
    """Return the same decisions as analysis takes them."""
    match settings.activations:
        case "all":
            activation_rows = LAST_ROW
        case "none":
            activation_rows = 0
        case n_rows:
            activation_rows = n_rows
    return Plan(
        n_rows=settings.rows,
        block_rows=settings.block_rows,
        n_examples=settings.examples,
        n_bands=settings.bands,
        n_band_examples=settings.band_examples,
        n_random_examples=settings.random_examples,
        seed=settings.seed,
        activation_rows=activation_rows,
        coactivation_floor=settings.coactivation_floor,
        window_before=settings.window_before,
        window_after=settings.window_after,
    )


@dataclasses.dataclass(frozen=True)
class AnalyzeResult:
    """The published tables, and what their ``layers`` row says."""

    path: Path
    n_rows: int
    n_features: int
    n_dead: int
    l0: float
    fvu: float | None
    of_rows: int | None = None
    """Rows of the split, where ``n_rows`` of them were drawn; None if all were read."""

    def feature(self, index: int) -> FeatureCard:
        """Return a feature's rows of the tables, which a notebook shows with their examples. Raises SettingsError."""
        return FeatureCard.read(self.path, int(index))

    def _repr_html_(self) -> str:
        drawn = "" if self.of_rows is None else f" of {self.of_rows:,}, drawn uniformly"
        facts = {"features": self.n_features, "rows": f"{self.n_rows:,}{drawn}", "dead": self.n_dead}
        return card("Tables", {**facts, "L0": self.l0, "FVU": self.fvu}, note=self.path)


def run(
    settings: AnalyzeSettings,
    *,
    transcoder: Path,
    output: Path,
    cache: CachePath | None = None,
    live: FreshText | None = None,
    compute: Compute = Compute(),
    model: str | None = None,
    downstream: Sequence[Path] = (),
    announce: Callable[[str], object] = logger.info,
) -> AnalyzeResult:
    """Publish the tables of ``transcoder`` at ``output``; return at once if they are there already.

    Rows come from ``cache`` or, with ``live``, from the language model that is run over fresh text for the purpose.

    ``model`` says where the language model lies if it moved; ``downstream`` are transcoders of later layers, to whose
    features connections are told. Workers share the units, and tables are the same to the bit for any number of them.
    ``announce`` is given a line of what the tables cost before they are made. Raises ArtifactMismatch if the transcoder
    is a cross-layer one or belongs to another model or site, or if other tables lie at ``output``; ModelError if the
    model cannot be loaded; SettingsError if the disk has no room for the activations.
    """
    layers = layers_of(open_transcoders(transcoder))
    if len(layers) > 1:
        raise ArtifactMismatch(
            f"{transcoder}: has {len(layers)} layers, which get tables each; use "
            "tailrace.pipeline.analyze.many.run, as the command does"
        )
    check_workers(compute, is_live=live is not None)
    with compute.opened():
        open_source = open_sources(
            settings, [transcoder], cache=cache, live=live, output=output, model=model, device=compute.device_name
        )
        if live is None:
            refuse_unused_model(settings, model, downstream)
        planned = plan(settings, layers[0], output, open_source, downstream)
        weights = share_weights(settings, {"": planned})
        return planned.make(weights, compute, announce=announce)


SourceOf = Callable[[TranscoderLayer], Source]
"""Where a layer has its rows from. Raises ArtifactMismatch if they are not there."""


def open_sources(
    settings: AnalyzeSettings,
    transcoders: Sequence[Path],
    *,
    cache: CachePath | None,
    live: FreshText | None,
    output: Path,
    model: str | None,
    device: str,
) -> SourceOf:
    """Open what all of ``transcoders`` have their rows from: one of cache and text, or SettingsError is raised."""
    if cache is not None and live is None:
        opened = reopen_cache(cache, output)

        def of_cache(layer: TranscoderLayer) -> Source:
            site = check_same_site(opened, layer)
            return SplitRows(opened, settings, site, model, device)

        return of_cache
    if live is None or cache is not None:
        given = "no rows to analyze" if cache is None else "rows come from a cache or from fresh text, not from both"
        raise SettingsError(f"{given}: give either --cache, or --live with --dataset and --rows")
    if settings.rows is None:
        raise SettingsError("rows: how much of the text to read is not known with --live; give --rows, such as 100k")
    n_rows = settings.rows
    open_model = functools.cache(lambda: open_transcoder_model(transcoders, model=model, device=device))
    return lambda layer: FreshRows(live, layer, n_rows, open_model)


def plan(
    settings: AnalyzeSettings,
    analysed: TranscoderLayer,
    output: Path,
    open_source: SourceOf,
    downstream: Sequence[Path],
) -> PlannedTables:
    """Return what is to be made of a layer; raise ArtifactMismatch or SettingsError if it cannot be."""
    return PlannedTables(settings, analysed, check_downstream(analysed, downstream), open_source(analysed), output)


@dataclasses.dataclass(frozen=True)
class PlannedTables:
    """Tables that are to be made of one layer. Neither rows nor model are opened yet."""

    settings: AnalyzeSettings
    analysed: TranscoderLayer
    downstream: Downstream
    source: Source
    output: Path

    @property
    def inputs(self) -> dict[str, Any]:
        """What the tables are made from, by digests."""
        inputs: dict[str, Any] = {**self.source.inputs, "transcoder": self.analysed.reference}
        if self.downstream:
            later = [layer for layers in self.downstream.values() for layer in layers]
            inputs["downstream"] = {layer.site.name: layer.reference for layer in later}
        return inputs

    @property
    def is_made(self) -> bool:
        """Whether tables are published at the output; ``refuse_other_tables`` tells if they are these."""
        return (self.output / MANIFEST).exists()

    @property
    def request(self) -> dict[str, Any]:
        """What decides the tables."""
        return {"settings": self.settings.model_dump(mode="json"), "inputs": self.inputs}

    def refuse_other_tables(self) -> None:
        """Raise ArtifactMismatch, or ArtifactBusy, if something else lies at the output; nothing is begun there."""
        if self.output.exists() and any(entry.name != LOCK for entry in self.output.iterdir()):
            with open_draft(self.output, KIND, self.request):
                pass

    def make(
        self,
        weights: SharedWeights,
        compute: Compute,
        *,
        announce: Callable[[str], object] = logger.info,
    ) -> AnalyzeResult:
        """Publish the tables unless they are there already. The other arguments are those of ``run``."""

        def make(path: Path) -> Made:
            with scratch_folder(path) as scratch:
                written = self._write_tables(weights, compute, path, scratch, announce)
            record = {
                "inputs": {**self.inputs, **self.source.found},
                "model": self.source.model,
                "site": self.analysed.site.as_json(),
                "tables": {name: {"n_rows": n_rows} for name, n_rows in written.n_rows.items()},
            }
            return Made(record, written.files, ("torch", "numpy", "pyarrow"))

        publish_stage(self.output, KIND, self.request, make)
        return read_result(self.output)

    def _write_tables(
        self,
        weights: SharedWeights,
        compute: Compute,
        path: Path,
        scratch: Path,
        announce: Callable[[str], object],
    ) -> WrittenTables:
        device = torch.device(compute.device_name)
        whole = AnalysisPass(self.source.rows(), self.analysed, plan_of(self.settings), device)
        coder = self.analysed.load().to(device)
        subject = with_density(whole.open_subject(coder, scratch=scratch), whole.plan)
        n_pairs = estimated_pairs(subject, whole.n_rows, whole.plan)
        refuse_too_much(n_pairs, path)
        announce(cost_line(subject, whole, n_pairs, compute))
        from_weights = self._write_weight_tables(weights, coder, whole.rows.vocabulary, path, compute.quiet)
        if from_weights is not None:
            subject = dataclasses.replace(subject, effects=from_weights.effects)
        written = write_tables(TABLES, whole.run(subject, compute), subject, whole.plan, path)
        if (documents := self.source.documents(whole.rows)) is not None:
            written = written.joined(write_documents(documents, whole.rows.split_name, path))
        if from_weights is None:
            return written
        return written.joined(WrittenTables({"connections": from_weights.n_connections}, [CONNECTIONS]))

    def _write_weight_tables(
        self, weights: SharedWeights, coder: Transcoder, vocabulary: Sequence[str], output: Path, quiet: bool
    ) -> FromWeights | None:
        """Write what weights alone tell; None if the model is left out."""
        if self.settings.without_model:
            return None
        with weights.used() as found:
            return write_weight_tables(
                coder,
                self.analysed,
                downstream=self.downstream,
                weights=found,
                vocabulary=vocabulary,
                output=output,
                n_ends=self.settings.connections,
                quiet=quiet,
            )


def share_weights(settings: AnalyzeSettings, planned: Mapping[str, PlannedTables]) -> SharedWeights:
    """Return the weights for the tables that are missing of ``planned``, by what errors about them begin with.

    Raises SettingsError if downstream transcoders read too early, for which the model is opened.
    """
    first = next(iter(planned.values()))
    n_missing = sum(not one.is_made for one in planned.values())
    if not (n_missing and first.downstream) or settings.without_model:
        return SharedWeights(first.source.open_model, n_missing)
    weights = SharedWeights(first.source.open_model, n_missing + 1)
    with weights.used() as found:
        problems = later_problems(first.downstream, found, {name: one.analysed.site for name, one in planned.items()})
    if problems:
        raise SettingsError("\n".join(problems))
    return weights


class OfSite(Protocol):
    """What was trained on a site of a language model: a transcoder, or a layer of one."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def site(self) -> Site: ...  # noqa: D102
    @property
    def model(self) -> Mapping[str, Any]: ...  # noqa: D102


def check_same_site(cache: ActivationCache, layer: OfSite) -> str:
    """Return the name of the transcoder's site; raise ArtifactMismatch unless the cache holds the same site and model.

    The storage dtype may differ: it changes how exactly activations are kept, not what they are.
    """
    there, wanted = cache.sites.get(layer.site.name), layer.site
    if there is None:
        raise ArtifactMismatch(
            f"{cache.path}: has no site {wanted.name!r}, which {layer.path} was trained on; "
            f"it has {', '.join(cache.sites)}. Give a cache with that site"
        )
    sites = [{**site.as_json(), "dtype": None} for site in (there, wanted)]
    differences = [
        *(f"model.{line}" for line in list_model_differences(cache.manifest.model, layer.model)),
        *list_differences({"site": sites[0]}, {"site": sites[1]}),
    ]
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ArtifactMismatch(
            f"{layer.path} was not trained on what {cache.path} holds; give the cache of its own model and site "
            f"('there' is the cache, 'asked for' the transcoder):\n{lines}"
        )
    return wanted.name


def refuse_unused_model(settings: AnalyzeSettings, model: str | None, downstream: Sequence[Path]) -> None:
    """Raise SettingsError if something is given for a model that is left out."""
    if settings.without_model and (model is not None or downstream):
        given = " and ".join(["--model"] * (model is not None) + ["--downstream"] * bool(downstream))
        raise SettingsError(f"--without-model leaves nothing for {given} to do; leave out one or the other")


def read_result(tables: Path) -> AnalyzeResult:
    """Return what published tables say as a whole. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    drawn = TablesManifest.read(tables).inputs.rows or {}
    (layer,) = read_table(tables / "layers.parquet").to_pylist()
    counts = (layer["n_rows"], layer["d_sae"], layer["n_dead"])
    return AnalyzeResult(tables, *counts, layer["l0_mean"], layer["fvu"], drawn.get("of_rows"))
