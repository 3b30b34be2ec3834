"""Tables artifacts with rows the test writes down, in the columns that exports and blind comparisons read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.tables import write_table
from tests.support.synthetic_cache import write_synthetic_cache

FEATURES = pa.schema(
    [
        ("feature", pa.int32()),
        ("frequency", pa.float64()),
        ("log10_frequency", pa.float64()),
        ("n_active", pa.int64()),
        ("max", pa.float32()),
        ("histogram", pa.list_(pa.int64())),
        ("histogram_edges", pa.list_(pa.float32())),
        ("promoted_tokens", pa.list_(pa.string())),
        ("suppressed_tokens", pa.list_(pa.string())),
    ]
)
EXAMPLES = pa.schema(
    [
        ("feature", pa.int32()),
        ("kind", pa.string()),
        ("band", pa.int32()),
        ("rank", pa.int32()),
        ("activation", pa.float32()),
        ("position", pa.int32()),
        ("window_start", pa.int32()),
        ("window_tokens", pa.list_(pa.string())),
        ("window_activations", pa.list_(pa.float32())),
    ]
)
SETTINGS = {"split": "heldout", "rows": None, "examples": 20}


def feature_row(feature: int, **changed: Any) -> dict[str, Any]:
    """Return a live feature's row: 100 active rows of 10,000, in two bins between 1 and 4."""
    row = {
        "feature": feature,
        "frequency": 0.01,
        "log10_frequency": -2.0,
        "n_active": 100,
        "max": 4.0,
        "histogram": [60, 40],
        "histogram_edges": [1.0, 2.0, 4.0],
        "promoted_tokens": [" up"],
        "suppressed_tokens": [" down"],
    }
    return {**row, **changed}


def dead_row(feature: int) -> dict[str, Any]:
    nothing = {"frequency": 0.0, "log10_frequency": None, "n_active": 0, "max": None}
    return feature_row(feature, **nothing, histogram=[], histogram_edges=[0.0])


def example_row(feature: int, rank: int = 0, activation: float = 4.0, **changed: Any) -> dict[str, Any]:
    """Return an example at the second of three tokens; the first is one the cache left out."""
    row = {
        "feature": feature,
        "kind": "top",
        "band": None,
        "rank": rank,
        "activation": activation,
        "position": 11,
        "window_start": 10,
        "window_tokens": ["<bos>", " the", f" word{feature}"],
        "window_activations": [None, activation, 0.0],
    }
    return {**row, **changed}


def publish_tables(
    path: Path,
    features: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    *,
    layer: int | None = 0,
    model: str = "tiny",
    settings: dict[str, Any] = SETTINGS,
    cache: dict[str, Any] | None = None,
    fresh: dict[str, Any] | None = None,
) -> Path:
    block = "somewhere" if layer is None else f"blocks.{layer}.mlp"
    site = Site(f"layer{layer}", f"{block}.hook_in", f"{block}.hook_out", 8, 8, "float32").as_json()
    source = fresh or {"cache": cache or {"cache_id": "c", "generation": 0, "digest": "d"}}
    inputs = {**source, "transcoder": {"digest": str(path)}}
    with Draft(path, "tables", {"settings": settings, "inputs": inputs}) as draft:
        for name, schema, rows in (("features", FEATURES, features), ("examples", EXAMPLES, examples)):
            batch = pa.RecordBatch.from_pylist(list(rows), schema)
            write_table(path / f"{name}.parquet", schema, [batch], row_group_rows=3)
        tables = {"features": {"n_rows": len(features)}, "examples": {"n_rows": len(examples)}}
        manifest = {"format": 1, "inputs": inputs, "model": {"name": model}, "site": site, "tables": tables}
        draft.publish(manifest, [f"{name}.parquet" for name in tables])
    return path


def publish_latents(root: Path) -> tuple[Path, Any, Any, Any, dict[tuple[int, int], Any]]:
    """Publish a cache, and tables ``t`` with activations of 6 features in two files over its held-out rows.

    Returns ``root``, the split, its rows' contexts and positions, and (feature, row, activation) by the first and last
    feature of a file.
    """
    cache = write_synthetic_cache(root / "cache", n_heldout_contexts=20)
    split = cache.split("heldout")
    units = [split.read_unit(unit, ["context", "position"]) for unit in range(split.n_units)]
    context = np.concatenate([unit["context"] for unit in units]).astype(np.int64)
    position = np.concatenate([unit["position"] for unit in units]).astype(np.int32)
    tables = publish_tables(root / "t", [feature_row(0)], [], cache=cache.reference)
    write_columns(tables / "rows.parquet", {"row": np.arange(split.n_rows), "context": context, "position": position})
    generator = np.random.default_rng(0)
    made = {}
    for first, last in ((0, 3), (4, 5)):
        feature = np.repeat(np.arange(first, last + 1), 7)
        row = np.concatenate(
            [np.sort(generator.choice(split.n_rows, 7, replace=False)) for _ in range(first, last + 1)]
        )
        activation = generator.uniform(0.5, 9, len(row)).astype(np.float32)
        if first == 4:
            activation[0] = 1e6
        (tables / "activations").mkdir(exist_ok=True)
        columns = {"feature": feature.astype(np.int32), "row": row, "activation": activation}
        write_columns(tables / f"activations/features-{first:06d}-{last:06d}.parquet", columns)
        made[first, last] = feature, row, activation
    return root, split, context, position, made


def write_columns(path: Path, columns: dict[str, Any]) -> None:
    batch = pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})
    write_table(path, batch.schema, [batch])
