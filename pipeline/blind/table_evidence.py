"""Evidence about a feature out of published tables: where it fires, and what it is connected to by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from tailrace.analysis.blind.sampling import LiveRule, draw
from tailrace.analysis.blind.withholding import Mode, Source
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.blind.study import BlindStudy
from tailrace.storage.artifact import read_manifest
from tailrace.storage.errors import SettingsError
from tailrace.storage.tables import read_schema, read_table

LIVE = LiveRule(min_log10_frequency=-4.0, min_active=4)
"""Features among which a random one is drawn."""
_WEIGHTS = ("promoted_tokens", "promoted_logits", "suppressed_tokens", "suppressed_logits")


class TableEvidence(NamedTuple):
    """A piece of evidence to be added to a study."""

    kind: str
    content: Any
    source: Source
    about: str


def begin_from_tables(
    directory: Path,
    tables: Path,
    *,
    feature: int | None,
    mode: Mode,
    seed: int = 0,
    rule: LiveRule = LIVE,
) -> BlindStudy:
    """Begin a study of ``feature``, or of a random live one, with the evidence its tables hold.

    Raises the errors of opening tables, SettingsError for a feature they do not have, and ArtifactMismatch if a study
    was begun at ``directory`` already.
    """
    manifest = read_manifest(tables, analyze.KIND)
    columns = read_table(tables / "features.parquet", ["log10_frequency", "n_active"])
    if feature is None:
        frequency = columns["log10_frequency"].to_numpy().astype(float)
        (drawn,) = draw(frequency, columns["n_active"].to_numpy(), 1, rule, seed, "study")
        feature = drawn.feature
    if not 0 <= feature < columns.num_rows:
        raise SettingsError(f"{tables}: has no feature {feature}, only 0 to {columns.num_rows - 1}")
    site = manifest["site"]["name"]
    subject = {"site": site, "feature": feature, "tables": manifest["digest"], "seed": seed}
    study = BlindStudy.begin(directory, subject, mode)
    for one in table_evidence(tables, feature):
        study.add(one.kind, one.content, source=one.source, about=one.about)
    return study


def table_evidence(tables: Path, feature: int) -> list[TableEvidence]:
    """Return what tables hold of a feature: examples, and connections and token effects where they were made."""
    found = []
    examples = read_table(tables / "examples.parquet", where=pc.field("feature") == feature).to_pylist()
    about = f"{len(examples)} examples: contexts, positions and activations around them"
    found.append(TableEvidence("activations", examples, "input", about))
    if (path := tables / "connections.parquet").exists():
        rows = read_table(path, where=pc.field("feature") == feature).to_pylist()
        about = f"{len(rows)} connections to tokens, heads and features of later layers"
        found.append(TableEvidence("connections", rows, "weights", about))
    features = tables / "features.parquet"
    if names := [name for name in _WEIGHTS if name in read_schema(features).names]:
        (row,) = read_table(features, names, pc.field("feature") == feature).to_pylist()
        if row[names[0]] is not None:
            found.append(TableEvidence("token effects", row, "weights", "tokens it promotes and suppresses"))
    return found
