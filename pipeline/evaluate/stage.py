"""The stage ``pipeline evaluate``: the language model with transcoders in place of its MLPs, on a cache's contexts.

Runs the model, unlike training and analysis: on stored contexts, so no text is opened, and with the row filter that
the cache was made with, so that outputs are replaced exactly where a transcoder could have learnt them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from tailrace.analysis.evaluate.evaluation import TOKEN_SCHEMA, ContextBatch, Evaluation, SplicedSite, token_rows
from tailrace.analysis.evaluate.splice_scores import SpliceScore
from tailrace.analysis.splice.in_place import layers_in_place
from tailrace.pipeline.analyze.stage import check_same_site
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.cache.recorded_model import RecordedModel, explained_passes, open_recorded_model, sample_contexts
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.shared.device import limited_threads, open_device
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.artifact import read_manifest
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.tables import write_table
from tailrace.training.architectures.transcoder import KIND as TRANSCODER_KIND
from tailrace.training.architectures.transcoder import load_transcoder, read_transcoder_manifest
from tailrace.training.cross_layer.artifact import is_cross_layer, load_cross_layer, read_cross_layer_manifest, sites_of

KIND = "evaluation"
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
TOKENS = "tokens.parquet"
"""Per-token deltas; the meaning of its columns lies in the file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateResult:
    """A published evaluation."""

    path: Path
    scores: dict[str, SpliceScore]
    """By site, and of ``all sites`` replaced at once where there are several."""


def run(
    settings: EvaluateSettings,
    *,
    transcoders: Sequence[Path],
    cache: Path,
    output: Path,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    model: str | None = None,
) -> EvaluateResult:
    """Publish the evaluation of ``transcoders``, each alone and all at once; return at once if it is there already.

    A folder that holds transcoders stands for all of them; ``model`` says where the language model lies if it moved.
    Raises ArtifactMismatch if a transcoder belongs to another model or site, if the model is not the cache's, or if
    another evaluation lies at ``output``; SettingsError if two transcoders replace the same site.
    """
    opened = open_cache(cache)
    split = opened.split(settings.split)
    given = _check_given(opened, each_artifact(transcoders, TRANSCODER_KIND))
    open_device(device)
    inputs = {"cache": opened.reference, "transcoders": given.inputs}
    request = {"format": FORMAT_VERSION, "settings": settings.model_dump(mode="json"), "inputs": inputs}
    with limited_threads(threads), Draft(output, KIND, request) as draft:
        if not draft.published:
            recorded = open_recorded_model(opened, model=model, device=device)
            evaluation = Evaluation(recorded.bridge, given.open(recorded), only_together=given.only_together)
            rows = _evaluate(evaluation, recorded, split, settings, quiet)
            n_rows = write_table(output / TOKENS, TOKEN_SCHEMA, rows)
            draft.publish(
                {
                    "format": FORMAT_VERSION,
                    "inputs": inputs,
                    "model": opened.manifest["model"],
                    "sites": given.sites,
                    "scores": [{"name": name, **score.record()} for name, score in evaluation.scores().items()],
                    "tables": {"tokens": {"n_rows": n_rows}},
                    "versions": {name: version(name) for name in ("torch", "transformer_lens", "transformers")},
                },
                [TOKENS],
            )
    return read_result(output)


def read_result(path: Path) -> EvaluateResult:
    """Return what a published evaluation says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    records = read_manifest(path, KIND)["scores"]
    return EvaluateResult(path, {record["name"]: SpliceScore.from_record(record) for record in records})


@dataclass(frozen=True)
class _Given:
    """The transcoders that were asked for: one a site, or one over several."""

    inputs: dict[str, Any]
    sites: dict[str, Any]
    """By name, as manifests record them."""
    open: Callable[[RecordedModel], list[SplicedSite]]
    only_together: bool = False


def _check_given(cache: ActivationCache, paths: Sequence[Path]) -> _Given:
    """Return what fits the cache; the errors are those of ``check_transcoders``."""
    across = [path for path in paths if is_cross_layer(path)]
    if not across:
        by_site = check_transcoders(cache, paths)
        return _Given(
            {site: {"digest": made_of["digest"]} for site, (_, made_of) in by_site.items()},
            {site: made_of["site"] for site, (_, made_of) in by_site.items()},
            lambda recorded: [open_spliced_site(recorded, path, site) for site, (path, _) in by_site.items()],
        )
    if len(paths) > 1:
        raise SettingsError(
            f"{across[0]}: is a cross-layer transcoder, which stands in for several MLPs together; evaluate it alone"
        )
    made_of = _check_cross_layer(cache, across[0])
    return _Given(
        {"cross-layer": {"digest": made_of["digest"]}},
        {site["name"]: site for site in made_of["sites"]},
        lambda recorded: _open_spliced_layers(recorded, across[0]),
        only_together=True,
    )


def check_transcoders(cache: ActivationCache, transcoders: Sequence[Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return path and manifest of each transcoder by its site, in the cache's order of sites.

    Raises ArtifactMismatch with everything that does not fit the cache, SettingsError if two replace one site or none
    is given.
    """
    if not transcoders:
        raise SettingsError("no transcoder to evaluate; give the path of at least one")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    mismatches, repeated = [], []
    for path in transcoders:
        made_of = read_transcoder_manifest(path)
        try:
            site = check_same_site(cache, cache.path, made_of, path)
        except ArtifactMismatch as error:
            mismatches.append(str(error))
            continue
        if site in found:
            repeated.append(f"{path} and {found[site][0]} both replace site {site}; evaluate them one at a time")
        found.setdefault(site, (path, made_of))
    if mismatches:
        raise ArtifactMismatch("\n".join([*mismatches, *repeated]))
    if repeated:
        raise SettingsError("\n".join(repeated))
    return {site: found[site] for site in cache.sites if site in found}


def open_spliced_site(recorded: RecordedModel, transcoder: Path, site: str) -> SplicedSite:
    """Load a transcoder beside the model, with the mean output over the cache's training rows for ablation."""
    coder = load_transcoder(transcoder).to(recorded.model.device)
    mean = recorded.cache.split("train").statistics(site, "out").mean
    return SplicedSite(recorded.cache.sites[site], coder, mean)


def _evaluate(
    evaluation: Evaluation, recorded: RecordedModel, split: CacheSplit, settings: EvaluateSettings, quiet: bool
) -> Iterator[pa.RecordBatch]:
    """Run the contexts; yield the rows of the table of tokens as they come."""
    contexts = sample_contexts(split, settings.contexts, settings.seed)
    logger.info("running %d %s contexts of %d", len(contexts), split.name, split.n_contexts)
    batches: Iterator[ContextBatch] = recorded.batches(split, contexts, settings.contexts_per_batch)
    with tqdm(total=len(contexts), desc="evaluate", unit="context", disable=quiet) as bar:
        for batch in batches:
            with explained_passes(len(batch.contexts)):
                deltas = evaluation.add(batch)
            for one in deltas:
                yield token_rows(one)
            bar.update(len(batch.contexts))


def _check_cross_layer(cache: ActivationCache, path: Path) -> dict[str, Any]:
    """Return the manifest of a cross-layer transcoder; raise ArtifactMismatch unless the cache has all its sites."""
    made_of = read_cross_layer_manifest(path)
    problems = []
    for site in made_of["sites"]:
        try:
            check_same_site(cache, cache.path, {"site": site, "model": made_of["model"]}, path)
        except ArtifactMismatch as error:
            problems.append(str(error))
    if problems:
        raise ArtifactMismatch("\n".join(dict.fromkeys(problems)))
    return made_of


def _open_spliced_layers(recorded: RecordedModel, path: Path) -> list[SplicedSite]:
    """Load a cross-layer transcoder beside the model, with each site's mean output for ablation."""
    transcoder = load_cross_layer(path).to(recorded.model.device)
    train = recorded.cache.split("train")
    sites = sites_of(read_cross_layer_manifest(path))
    return [
        SplicedSite(recorded.cache.sites[site.name], part, train.statistics(site.name, "out").mean)
        for site, part in zip(sites, layers_in_place(transcoder), strict=True)
    ]
