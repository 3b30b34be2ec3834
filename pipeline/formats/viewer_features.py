"""Feature files of the circuit-tracer viewer: one file of compressed records per layer, and an index of where they lie.

A record is four bytes, the length of what follows (little-endian), and the gzip of the feature's JSON. The viewer asks
for the bytes from a feature's offset to the next one's and needs the length, since its range takes one byte too many.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tailrace.pipeline.formats.hooks import layer_hooks
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.storage.artifact import make_directory, storage_refused, write_atomically
from tailrace.storage.compared import refuse_changed
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing, SettingsError
from tailrace.storage.names import temporary_path
from tailrace.storage.tables import TablesManifest, read_schema, read_table

FOLDER, INDEX = "features", "index.json.gz"
N_BINS = 50
_LENGTH = struct.Struct("<I")
_STATISTICS = ("feature", "frequency", "max", "histogram", "histogram_edges")
_LOGITS = ("promoted_tokens", "suppressed_tokens")
_KINDS = {"top": 0, "band": 1, "random": 2}

_COLUMNS = (
    "feature", "kind", "band", "rank", "activation", "position", "window_start", "window_tokens", "window_activations",
)  # fmt: skip


@dataclass(frozen=True)
class LayerTables:
    """Published tables of one layer's transcoder."""

    path: Path
    manifest: TablesManifest
    layer: int

    @property
    def file(self) -> str:
        """Name of this layer's records."""
        return f"layer_{self.layer}.bin"


def open_tables(paths: Sequence[Path]) -> list[LayerTables]:
    """Open tables and sort them by layer.

    Raises the errors of opening them, SettingsError with every table whose site has no layer, every layer that two
    tables have, and models that differ.
    """
    if not paths:
        raise SettingsError("nothing to export; give the path of at least one artifact of tables")
    found, problems = [], []
    for path in paths:
        manifest = TablesManifest.read(path)
        site = manifest.site
        if (hooks := layer_hooks(site)) is None:
            problems.append(
                f"{path}: its site, {site.hook_in} to {site.hook_out}, belongs to no one layer, by which the "
                "viewer finds features"
            )
        else:
            found.append(LayerTables(path, manifest, hooks.layer))
    found.sort(key=lambda one: one.layer)
    for layer, several in groupby(found, key=lambda one: one.layer):
        if len(names := [str(one.path) for one in several]) > 1:
            problems.append(f"layer {layer}: {' and '.join(names)} are both of it; the viewer has one per layer")
    for one in found[1:]:
        if differences := list_model_differences(found[0].manifest.model, one.manifest.model):
            problems.append(
                f"{one.path}: its model is another than that of {found[0].path} ('there'): {'; '.join(differences)}; "
                "export one model's tables at a time"
            )
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def write(directory: Path, tables: Sequence[LayerTables]) -> list[str]:
    """Write the files of all layers; return their names. Layers that are not there get an empty entry in the index."""
    folder = directory / FOLDER
    make_directory(folder)
    index: list[dict[str, Any]] = [{"filename": "", "offsets": []} for _ in range(tables[-1].layer + 1)]
    for one in tables:
        offsets = _write_records(folder / one.file, _records(one))
        index[one.layer] = {"filename": one.file, "offsets": offsets}
    # Last: the viewer looks for nothing before it has the index.
    write_atomically(folder / INDEX, _compress(index))
    return [f"{FOLDER}/{INDEX}", *(f"{FOLDER}/{one.file}" for one in tables)]


def _write_records(path: Path, records: Iterator[bytes]) -> list[int]:
    """Write records one after the other; return where each begins, and where the last one ends."""
    temporary = temporary_path(path)
    offsets = [0]
    try:
        with temporary.open("wb") as file:
            for record in records:
                file.write(_LENGTH.pack(len(record)) + record)
                offsets.append(offsets[-1] + _LENGTH.size + len(record))
        temporary.rename(path)
    except OSError as error:
        raise storage_refused(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    return offsets


def _records(tables: LayerTables) -> Iterator[bytes]:
    """Yield the compressed JSON of every feature from 0 on, dead ones included: offsets are found by index."""
    path = tables.path / "features.parquet"
    names = set(read_schema(path).names)
    columns = [*_STATISTICS, *(name for name in _LOGITS if name in names)]
    features = read_table(path, columns).to_pylist()
    groups = _example_groups(tables.path / "examples.parquet")
    waiting = next(groups, None)
    for place, row in enumerate(features):
        if row["feature"] != place:
            raise ArtifactCorrupt(f"{path}: row {place} is of feature {row['feature']}; make the tables again")
        examples: list[dict[str, Any]] = []
        if waiting is not None and waiting[0] == place:
            examples, waiting = waiting[1], next(groups, None)
        yield _compress(feature_json(row, examples, tables.manifest.site.name))


def feature_json(
    feature: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], transcoder_id: str
) -> dict[str, Any]:
    """Return what the viewer shows of one feature, from its rows of the tables ``features`` and ``examples``.

    The histogram is over ``N_BINS`` equal bins from 0 to the maximum: the table's log-spaced bins are cut, and counts
    spread evenly inside each. Percentiles are geometric middles of the table's bins, as in the table.
    """
    counts = np.asarray(feature["histogram"], np.float64)
    edges = np.asarray(feature["histogram_edges"], np.float64)
    largest = float(feature["max"] or 0.0)
    return {
        "transcoder_id": transcoder_id,
        "index": feature["feature"],
        "examples_quantiles": _quantiles(examples),
        "top_logits": list(feature.get("promoted_tokens") or []),
        "bottom_logits": list(feature.get("suppressed_tokens") or []),
        "act_min": 0.0,
        "act_max": largest,
        "quantile_values": _percentiles(counts, edges, largest),
        "histogram": equal_bins(counts, edges, largest).tolist(),
        "activation_frequency": feature["frequency"],
    }


def equal_bins(counts: NDArray[np.float64], edges: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """Spread counts of bins between ``edges`` over ``N_BINS`` equal bins from 0 to ``largest``; the sum is the same."""
    if not len(counts) or largest <= 0:
        return np.zeros(N_BINS)
    ends = np.minimum(edges, largest)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    # A last bin that lies above the maximum altogether (values beyond the table's range) counts at the maximum.
    borders = np.linspace(0, largest, N_BINS + 1)
    below = np.interp(borders, ends, cumulative, left=0.0)
    below[-1] = cumulative[-1]
    spread: NDArray[np.float64] = np.diff(below)
    return spread


def _percentiles(counts: NDArray[np.float64], edges: NDArray[np.float64], largest: float) -> list[float]:
    """Return the 1st to 99th percentile by nearest rank, each within half a bin; empty for a dead feature."""
    if not len(counts):
        return []
    middles = np.minimum(np.sqrt(edges[:-1] * edges[1:]), largest)
    cumulative = np.cumsum(counts)
    ranks = np.ceil(np.arange(1, 100) / 100 * cumulative[-1])
    return [float(value) for value in middles[np.searchsorted(cumulative, ranks)]]


def _quantiles(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of examples: the strongest, the bands from strong to weak, the random ones."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for example in examples:
        band = example.get("band")
        key = (_KINDS[example.get("kind") or "top"], 0 if band is None else -int(band))
        groups.setdefault(key, []).append(example)
    return [
        {"quantile_name": _group_name(*key), "examples": [_example(one) for one in groups[key]]}
        for key in sorted(groups)
    ]


def _group_name(kind: int, minus_band: int) -> str:
    if kind == _KINDS["band"]:
        return f"Band {1 - minus_band} of 5"
    return "Top activations" if kind == _KINDS["top"] else "Random activations"


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokens_acts_list": [value or 0.0 for value in example["window_activations"]],
        "train_token_ind": example["position"] - example["window_start"],
        "is_repeated_datapoint": False,
        "tokens": example["window_tokens"],
    }


def _compress(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode(), mtime=0)  # no time of day: equal tables give equal bytes


def _example_groups(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each feature that has examples, ascending, with its rows of the table ``examples`` as dictionaries.

    Raises ArtifactMissing, or ArtifactCorrupt if features are not in order.
    """
    previous = -1
    for feature, rows in groupby(_rows(path), key=itemgetter("feature")):
        if feature <= previous:
            raise ArtifactCorrupt(f"{path}: is not sorted by feature; make the tables again")
        previous = feature
        yield feature, list(rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise ArtifactMissing(f"{path}: there is no such table; run pipeline analyze")
    refuse_changed(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()
