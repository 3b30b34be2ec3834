"""`pipeline analyze`: read a split of a cache once with a transcoder and publish tables about its features.

Runs no language model: its weights are read for what they alone tell, unless it is left out, and are gone before rows
are read. The transcoder may come from another cache than the one read, as long as both hold the same
site of the same model: what matters is what the numbers are, not which rows were trained on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.compute as pc
import torch
from pydantic import Field
from tqdm import tqdm

from analysis.harvest import Plan, Subject, gather
from analysis.table import Table, accumulators
from analysis.tables import TABLES
from pipeline.device import limited_threads, open_device
from pipeline.recorded_model import open_recorded_model
from pipeline.weight_tables import FromWeights, check_downstream, write_weight_tables
from storage.activation_cache import ActivationCache, open_cache
from storage.artifact import Draft, list_differences, read_manifest
from storage.errors import ArtifactMismatch, SettingsError
from storage.settings import Quantity, Settings
from storage.tables import read_table, write_table
from training.transcoder import Transcoder, load_transcoder, read_transcoder_manifest

KIND = "tables"
FORMAT_VERSION = 1

logger = logging.getLogger(__name__)

_SHORTEST_WORD = 4
_FAMILY_SHARE = (0.2, 0.8)
"""Share of a feature's examples on its top token that tells a family of tokens from a single one."""
_READABLE_FREQUENCY = 0.02


class AnalyzeSettings(Settings):
    """What to count, over which rows."""

    split: Literal["heldout", "train"] = "heldout"
    """Rows to read: heldout (documents the transcoder never saw) or train."""

    rows: Quantity | None = Field(default=None, gt=0)
    """Read only this many rows, from the start of the split in token order; all of them if not given."""

    examples: int = Field(default=20, ge=1)
    """Strongest examples kept per feature, at most one from each context."""

    window_before: int = Field(default=24, ge=0)
    """Tokens shown before an example, within its context."""

    window_after: int = Field(default=8, ge=0)
    """Tokens shown after an example, within its context."""

    without_model: bool = False
    """Leave the language model's weights out: no promoted tokens, no connections.parquet."""

    block_rows: int = Field(default=2048, ge=1)
    """Rows encoded at once: memory is this times d_sae times 4 bytes, a few times over."""

    def plan(self) -> Plan:
        """Return the same decisions as analysis takes them."""
        return Plan(
            n_rows=self.rows,
            block_rows=self.block_rows,
            n_examples=self.examples,
            window_before=self.window_before,
            window_after=self.window_after,
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


class FeatureLine(NamedTuple):
    """A feature at a glance."""

    feature: int
    frequency: float
    max: float
    top_tokens: list[str]
    """Distinct tokens of its examples, strongest first."""
    example: str
    """The text around its strongest example, whose token stands between » and «."""


def run(
    settings: AnalyzeSettings,
    *,
    cache: Path,
    transcoder: Path,
    output: Path,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    model: str | None = None,
    downstream: Sequence[Path] = (),
) -> AnalyzeResult:
    """Publish the tables of ``transcoder`` over ``cache`` at ``output``; return at once if they are there already.

    ``model`` says where the language model lies if it moved; ``downstream`` are transcoders of later layers, to whose
    features connections are told. Raises ArtifactMismatch if the transcoder belongs to another model or site, or if
    other tables lie at ``output``; ModelError if the model cannot be loaded.
    """
    opened = open_cache(cache)
    made_of = read_transcoder_manifest(transcoder)
    site = check_same_site(opened, cache, made_of, transcoder)
    on = open_device(device)
    _refuse_unused_model(settings, model, downstream)
    later = check_downstream(transcoder, made_of, downstream)
    inputs = {"cache": opened.reference, "transcoder": {"digest": made_of["digest"]}}
    if later:
        inputs["downstream"] = {other["site"]["name"]: {"digest": other["digest"]} for other in later.values()}
    request = {"format": FORMAT_VERSION, "settings": settings.model_dump(mode="json"), "inputs": inputs}
    with Draft(output, KIND, request) as draft:
        if not draft.published:
            _remove_leftovers(draft.path)
            with limited_threads(threads):
                coder = load_transcoder(transcoder).to(on)
                from_weights = None
                if not settings.without_model:
                    from_weights = write_weight_tables(
                        coder,
                        made_of["site"],
                        downstream=later,
                        open_model=lambda: open_recorded_model(opened, model=model, device=device).model,
                        vocabulary=opened.vocabulary(),
                        output=draft.path,
                        quiet=quiet,
                    )
                subject = _open_subject(opened, site, settings, coder, on, from_weights)
                n_table_rows = _write_tables(subject, settings.plan(), draft.path, quiet)
                if from_weights is not None:
                    n_table_rows["connections"] = from_weights.n_connections
            draft.publish(
                {
                    "format": FORMAT_VERSION,
                    "inputs": inputs,
                    "model": opened.manifest["model"],
                    "site": made_of["site"],
                    "tables": {name: {"n_rows": n_rows} for name, n_rows in n_table_rows.items()},
                    "versions": {name: version(name) for name in ("torch", "numpy", "pyarrow")},
                },
                [f"{name}.parquet" for name in n_table_rows],
            )
    return read_result(output)


def check_same_site(cache: ActivationCache, cache_path: Path, transcoder: dict[str, Any], transcoder_path: Path) -> str:
    """Return the name of the transcoder's site; raise ArtifactMismatch unless the cache holds the same site and model.

    The storage dtype may differ: it changes how exactly activations are kept, not what they are.
    """
    wanted = {key: value for key, value in transcoder["site"].items() if key != "dtype"}
    there = cache.sites.get(wanted["name"])
    if there is None:
        raise ArtifactMismatch(
            f"{cache_path}: has no site {wanted['name']!r}, which {transcoder_path} was trained on; "
            f"it has {', '.join(cache.sites)}. Give a cache with that site"
        )
    found = {key: value for key, value in dataclasses.asdict(there).items() if key in wanted}
    differences = list_differences(
        {"model": cache.manifest["model"], "site": found}, {"model": transcoder["model"], "site": wanted}
    )
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ArtifactMismatch(
            f"{transcoder_path} was not trained on what {cache_path} holds; give the cache of its own model and site "
            f"('there' is the cache, 'asked for' the transcoder):\n{lines}"
        )
    return str(wanted["name"])


def _refuse_unused_model(settings: AnalyzeSettings, model: str | None, downstream: Sequence[Path]) -> None:
    if settings.without_model and (model is not None or downstream):
        given = " and ".join(["--model"] * (model is not None) + ["--downstream"] * bool(downstream))
        raise SettingsError(f"--without-model leaves nothing for {given} to do; leave out one or the other")


def _open_subject(
    cache: ActivationCache,
    site: str,
    settings: AnalyzeSettings,
    coder: Transcoder,
    device: torch.device,
    from_weights: FromWeights | None,
) -> Subject:
    split = cache.split(settings.split)
    return Subject(
        coder=coder,
        split=split,
        split_name=settings.split,
        site=site,
        output_mean=split.statistics(site, "out").mean,
        vocabulary=cache.vocabulary(),
        device=device,
        effects=None if from_weights is None else from_weights.effects,
    )


def _write_tables(subject: Subject, plan: Plan, output: Path, quiet: bool) -> dict[str, int]:
    """Make every table in ``output``; return the number of rows of each."""
    n_rows = min(plan.n_rows or subject.split.n_rows, subject.split.n_rows)
    logger.info("reading %d %s rows of %s", n_rows, subject.split_name, subject.site)
    with tqdm(total=n_rows, desc="analyze", unit="row", unit_scale=True, disable=quiet or None) as bar:
        harvest = gather(subject, plan, accumulators(TABLES), progress=bar.update)
    counts = {}
    for table in TABLES:
        batches = table.compute(harvest, subject, plan)
        counts[table.name] = write_table(
            output / _file_name(table),
            table.schema,
            batches,
            row_group_rows=table.row_group_rows,
            metadata=table.metadata,
        )
        logger.info("wrote %s, %d rows", _file_name(table), counts[table.name])
    return counts


def _remove_leftovers(draft: Path) -> None:
    """Delete what a killed run left half-written. Only for the holder of the draft's lock."""
    for path in draft.glob(".*.tmp*"):
        path.unlink()


def _file_name(table: Table) -> str:
    return f"{table.name}.parquet"


def read_result(tables: Path) -> AnalyzeResult:
    """Return what published tables say as a whole. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    read_manifest(tables, KIND)
    (layer,) = read_table(tables / "layers.parquet").to_pylist()
    return AnalyzeResult(tables, layer["n_rows"], layer["d_sae"], layer["n_dead"], layer["l0_mean"], layer["fvu"])


def summary(result: AnalyzeResult, n_features: int = 8, n_tokens: int = 5) -> list[FeatureLine]:
    """Return a few features that are easy to read, no two with the same top token.

    Sparse features on a family of words come first, then those on a single token, dense ones last; features with half
    or fewer of the examples that others have are left out.
    """
    columns = ["feature", "frequency", "max", "top_token", "top_token_id", "top_token_share"]
    features = read_table(result.path / "features.parquet", columns, pc.field("n_active") > 0).to_pylist()
    shown = ["feature", "token", "position", "window_start", "window_tokens"]
    counted = read_table(result.path / "examples.parquet", ["feature"])["feature"].value_counts().to_pylist()
    n_examples = {entry["values"]: entry["counts"] for entry in counted}
    enough = max(n_examples.values(), default=0) / 2
    readable = [row for row in features if n_examples[row["feature"]] > enough]
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(readable, key=_readability):
        best.setdefault(row["top_token_id"], row)
    chosen = list(best.values())[:n_features]
    is_chosen = pc.field("feature").isin([row["feature"] for row in chosen])
    examples = read_table(result.path / "examples.parquet", shown, is_chosen).to_pylist()
    return [_line(row, [own for own in examples if own["feature"] == row["feature"]], n_tokens) for row in chosen]


def _readability(feature: dict[str, Any]) -> tuple[bool, bool, bool, float, int]:
    """Order features by how well a few examples show what they are about."""
    is_word = feature["top_token"].strip().isalpha() and len(feature["top_token"].strip()) >= _SHORTEST_WORD
    is_family = _FAMILY_SHARE[0] <= feature["top_token_share"] <= _FAMILY_SHARE[1]
    is_frequent = feature["frequency"] > _READABLE_FREQUENCY
    return is_frequent, not is_word, not is_family, -feature["max"], feature["feature"]


def _line(feature: dict[str, Any], examples: list[dict[str, Any]], n_tokens: int) -> FeatureLine:
    tokens = list(dict.fromkeys(example["token"] for example in examples))[:n_tokens]
    window, place = examples[0]["window_tokens"], examples[0]["position"] - examples[0]["window_start"]
    text = "".join(window[:place]) + "»" + window[place] + "«" + "".join(window[place + 1 :])
    return FeatureLine(feature["feature"], feature["frequency"], feature["max"], tokens, text)
