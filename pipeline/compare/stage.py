"""``pipeline compare``: for each feature of one dictionary the most similar of another, and how many match at all.

By the rows on which features fire, where both tables keep activations of the same rows, and by decoder rows, where the
transcoders are given. A feature is matched if it is more similar than features that have nothing to do with each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.matches import (
    NULL_SHARE,
    Fires,
    Matches,
    Similar,
    fires,
    most_similar_decoders,
    most_similar_rows,
    next_context,
    rotated,
)
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer, layers_of, open_transcoders
from tailrace.pipeline.compare.page import SIDES, page
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.artifact import write_output
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import SettingsError
from tailrace.storage.labels import owner_of, read_labels
from tailrace.storage.names import matching
from tailrace.storage.tables import column, read_table, write_table

SUFFIXES = (".parquet", ".json", ".html")
_SEED = 0
"""Of the rotation: it decides nothing that is reported to more digits than are shown."""

SCHEMA = pa.schema(
    [
        column("side", pa.string(), "tables that the feature is of: a, the first given, or b"),
        column("feature", pa.int32(), "index of the feature"),
        column("label", pa.string(), "its label; empty if it has none"),
        column("cosine_feature", pa.int32(), "feature of the other side with the nearest decoder row", nullable=True),
        column("cosine", pa.float64(), "cosine of the two decoder rows", nullable=True),
        column("cosine_matched", pa.bool_(), "whether it is above what a rotated decoder reaches", nullable=True),
        column("cosine_mutual", pa.bool_(), "whether each of the two is the nearest of the other", nullable=True),
        column("phi_feature", pa.int32(), "feature of the other side that fires most alike", nullable=True),
        column("phi", pa.float64(), "φ, the correlation of firing over rows", nullable=True),
        column("jaccard", pa.float64(), "rows on which both fire over rows on which either does", nullable=True),
        column("phi_matched", pa.bool_(), "whether φ is above what other contexts reach", nullable=True),
        column("phi_mutual", pa.bool_(), "whether each of the two fires most like the other", nullable=True),
    ]
)


@dataclass(frozen=True)
class ComparisonResult:
    """The most similar features of two dictionaries."""

    table: pa.Table
    """A row for each feature of both."""
    summary: dict[str, Any]
    """Shares of features that match, by measure and side, with the null's threshold."""


def run(
    tables: tuple[Path, Path],
    *,
    transcoders: Sequence[Path] = (),
    output: Path | None = None,
    compute: Compute = Compute(),
) -> ComparisonResult:
    """Compare two tables; write the table of matches to ``output``, a .parquet, .json or .html file.

    ``transcoders`` of the tables, or folders of them, let decoder rows be compared. Raises SettingsError if nothing can
    be compared, saying why; ArtifactError.
    """
    if output is not None and output.suffix not in SUFFIXES:
        raise SettingsError(f"--out {output}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")
    opened = tuple(FeatureTables(path) for path in tables)
    reasons: dict[str, str] = {}
    with compute.opened() as device, torch.inference_mode():
        by_measure: dict[str, tuple[Matches, Matches]] = {}
        decoders = _decoders(opened, transcoders, reasons)
        if decoders is not None:
            by_measure["cosine"] = _by_decoder(*(decoder.to(device) for decoder in decoders))
        kept = _same_rows(opened, reasons)
        if kept is not None:
            by_measure["phi"] = _by_rows(*kept)
    if not by_measure:
        raise SettingsError("nothing can be compared:\n" + "\n".join(reasons.values()))
    table = pa.concat_tables(_rows(side, one, by_measure) for side, one in enumerate(opened))
    summary = _summary(opened, by_measure, reasons)
    if output is not None:
        _write(output, table, summary, opened)
    return ComparisonResult(table, summary)


def _decoders(
    opened: Sequence[FeatureTables], transcoders: Sequence[Path], reasons: dict[str, str]
) -> list[torch.Tensor] | None:
    """Return the decoder rows of both, or None with the reason."""
    if not transcoders:
        reasons["cosine"] = "decoder rows: the transcoders were not given; add --transcoders PATH for each"
        return None
    by_owner: dict[tuple[str, str], TranscoderLayer] = {
        (layer.digest, layer.site.name): layer for layer in layers_of(open_transcoders(transcoders))
    }
    owners = [owner_of(one.manifest) for one in opened]
    layers = [by_owner.get((owner["transcoder"], owner["site"])) for owner in owners]
    if missing := [str(one.path) for one, layer in zip(opened, layers, strict=True) if layer is None]:
        raise SettingsError(f"--transcoders: that of {' and of '.join(missing)} is not among those given; add its path")
    decoders = [layer.load().W_dec.detach() for layer in layers if layer is not None]
    widths = [decoder.shape[1] for decoder in decoders]
    if widths[0] != widths[1]:
        reasons["cosine"] = f"decoder rows: they have {widths[0]} and {widths[1]} numbers; only equal widths compare"
        return None
    return decoders


def _same_rows(
    opened: Sequence[FeatureTables], reasons: dict[str, str]
) -> tuple[Fires, Fires, NDArray[np.int64]] | None:
    """Return where features of both fire, on the rows that both keep, and the row at the same position of the next
    context; None with the reason if they keep none in common.
    """
    if without := [str(one.path) for one in opened if not one.has("rows")]:
        reasons["phi"] = f"activations: {' and '.join(without)} keep none; run pipeline analyze with --activations all"
        return None
    sources = [
        {"cache": None if one.manifest.inputs.cache is None else one.manifest.inputs.cache.as_json(),
         "split": one.manifest.settings["split"]}
        for one in opened
    ]  # fmt: skip
    if any(source["cache"] is None for source in sources) or sources[0] != sources[1]:
        differences = list_differences(*sources) or ["fresh text, whose rows have no common numbers"]
        reasons["phi"] = f"activations: the two were made from other rows ({'; '.join(differences)})"
        return None
    rows = [read_table(one.path / "rows.parquet", ["row", "context", "position"]) for one in opened]
    a, b = (one["row"].to_numpy() for one in rows)
    common, first, _ = np.intersect1d(a, b, return_indices=True)
    if not len(common):
        reasons["phi"] = "activations: the two keep no row in common; analyze the same --rows of the cache"
        return None
    places = [rows[0][name].to_numpy()[first].astype(np.int64) for name in ("context", "position")]
    return _fires(opened[0], common), _fires(opened[1], common), next_context(*places)


def _fires(tables: FeatureTables, common: NDArray[np.int64]) -> Fires:
    features, rows = [], []
    for path in matching(tables.path / "activations", "*.parquet"):
        part = read_table(path, ["feature", "row"])
        own = part["row"].to_numpy()
        place = np.minimum(np.searchsorted(common, own), len(common) - 1)
        is_common = common[place] == own
        features.append(part["feature"].to_numpy()[is_common].astype(np.int64))
        rows.append(place[is_common])
    return fires(np.concatenate(features), np.concatenate(rows), tables.n_features, len(common))


def _by_decoder(a: torch.Tensor, b: torch.Tensor) -> tuple[Matches, Matches]:
    pairs = ((a, b), (b, a))
    one, other = (
        Matches(most_similar_decoders(own, to), most_similar_decoders(own, rotated(to, _SEED))) for own, to in pairs
    )
    return one, other


def _by_rows(a: Fires, b: Fires, following: NDArray[np.int64]) -> tuple[Matches, Matches]:
    """Return the matches; in the null, each row of b is compared with a row of a in the context after it."""
    rows = np.flatnonzero(following >= 0)
    here, there = np.full(a.n_rows, -1), np.full(a.n_rows, -1)
    here[rows], there[following[rows]] = np.arange(len(rows)), np.arange(len(rows))
    moved_a, moved_b = a.moved(there, len(rows)), b.moved(here, len(rows))
    return (
        Matches(most_similar_rows(a, b), most_similar_rows(moved_a, moved_b)),
        Matches(most_similar_rows(b, a), most_similar_rows(moved_b, moved_a)),
    )


def _rows(side: int, tables: FeatureTables, by_measure: Mapping[str, tuple[Matches, Matches]]) -> pa.Table:
    n = tables.n_features
    labels = read_labels(tables.path)
    columns: dict[str, Any] = {
        "side": [SIDES[side]] * n,
        "feature": np.arange(n),
        "label": [labels[feature].label if feature in labels else "" for feature in range(n)],
    }
    for measure, matches in by_measure.items():
        own, other = matches[side].found, matches[1 - side].found
        there = own.feature >= 0
        columns |= {
            f"{measure}_feature": _where(there, own.feature),
            measure: _where(there, own.similarity),
            f"{measure}_matched": _where(there, matches[side].are_matched),
            f"{measure}_mutual": _where(there, _are_mutual(own, other)),
        }
        if own.jaccard is not None:
            columns["jaccard"] = _where(there, own.jaccard)
    arrays = [pa.array(columns.get(field.name, [None] * n), field.type) for field in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def _where(there: NDArray[np.bool_], values: NDArray[Any]) -> list[Any]:
    return [value if kept else None for value, kept in zip(values.tolist(), there.tolist(), strict=True)]


def _are_mutual(own: Similar, other: Similar) -> NDArray[np.bool_]:
    back = other.feature[np.maximum(own.feature, 0)]
    is_mutual: NDArray[np.bool_] = (own.feature >= 0) & (back == np.arange(len(own.feature)))
    return is_mutual


def _summary(
    opened: Sequence[FeatureTables], by_measure: Mapping[str, tuple[Matches, Matches]], reasons: Mapping[str, str]
) -> dict[str, Any]:
    sides = {
        side: {"tables": str(one.path), "digest": one.manifest.digest, "features": one.n_features}
        for side, one in zip(SIDES, opened, strict=True)
    }
    measures = {
        measure: {side: _shares(*matches[::step]) for side, step in zip(SIDES, (1, -1), strict=True)}
        for measure, matches in by_measure.items()
    }
    return {**sides, **measures, "null_share": NULL_SHARE, "left_out": dict(reasons)}


def _shares(own: Matches, other: Matches) -> dict[str, Any]:
    """Return of the features that can be compared: how many, the null's threshold, and the shares above it."""
    there = own.found.feature >= 0
    n = int(there.sum())
    is_matched = own.are_matched & there
    mutual = _are_mutual(own.found, other.found) & is_matched
    return {
        "compared": n,
        "chance": None if np.isnan(own.chance) else own.chance,
        "matched": int(is_matched.sum()) / n if n else None,
        "mutual": int(mutual.sum()) / n if n else None,
        "median": float(np.median(own.found.similarity[there])) if n else None,
    }


def _write(output: Path, table: pa.Table, summary: dict[str, Any], opened: Sequence[FeatureTables]) -> None:
    match output.suffix:
        case ".parquet":
            write_table(output, SCHEMA, table.to_batches(), metadata={"summary": json.dumps(summary)})
        case ".html":
            write_output(output, page(table, summary, [one.descriptions() for one in opened]).encode())
        case _:
            content = {"summary": summary, "features": table.to_pylist()}
            write_output(output, json.dumps(content, ensure_ascii=False, allow_nan=False).encode())
