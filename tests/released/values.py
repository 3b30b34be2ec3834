"""What is read in an artifact: what must be equal everywhere, what must be equal to the bit, and what may round.

``order``: rows, their order and provenance, names, schemas, shapes. ``stored``: digests of the numbers that lie in the
files. ``numbers``: means and scores, which another machine or library makes anew with other last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.pipeline.artifacts.info_stage import SUMMARIES
from tailrace.pipeline.artifacts.manifests import TaskManifest
from tailrace.pipeline.blind.draw import KEY
from tailrace.pipeline.blind.sealed import unseal
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.query import stage as query
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.artifact import MANIFEST, Manifest, published_kind
from tailrace.storage.cache_format import PROVENANCE, CacheManifest, EpochManifest
from tailrace.storage.statistics import as_float32
from tailrace.storage.tables import read_schema, read_table
from tailrace.training.architectures.manifest import AnyTranscoderManifest, CrossLayerManifest, TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.cross_layer.layers import load_cross_layer

VALUES = "values.json"
Values = dict[str, dict[str, Any]]


def comparable(name: str, values: dict[str, Any]) -> Any:
    """Return the order of an artifact's values as JSON, without what releases record of it in different ways.

    Of an import, d14043a records its own defaults for training beside the architecture that the files say. Its circuits
    do not say what features fire on.
    """
    order = json.loads(json.dumps(values["order"]))
    if name.startswith("imports/"):
        order["architecture"] = order["architecture"]["kind"]
    if name.startswith("circuits/"):
        order = [key for key in order if key != "features"]
    return order


def read_all(folder: Path) -> dict[str, Values]:
    """Return what is read in every published artifact below ``folder``, by its path there."""
    return {name: read_values(folder / name) for name in artifacts(folder)}


def artifacts(folder: Path) -> dict[str, str]:
    """Return the kind of every published artifact below ``folder``, by its path there."""
    manifests = sorted(folder.rglob(MANIFEST))
    return {one.parent.relative_to(folder).as_posix(): json.loads(one.read_bytes())["kind"] for one in manifests}


def read_values(path: Path) -> Values:
    """Return what is read in the artifact at ``path``."""
    kind = json.loads((path / MANIFEST).read_bytes())["kind"]
    return _READERS[kind](path)


def _values(order: Any, stored: Any, numbers: dict[str, float | None]) -> Values:
    return {"order": order, "stored": stored, "numbers": numbers}


def _digest(value: Any) -> str:
    data = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _cache(path: Path) -> Values:
    newest = open_cache(path)
    values = _values({}, {}, {})
    for generation in range(newest.generation + 1):
        cache = open_cache(path, generation)
        for name in sorted(cache.manifest.splits):
            _add_split(values, f"{generation}/{name}", cache, cache.split(name))
    values["order"]["epochs"] = sorted(folder.name for folder in (path / "epochs").glob("*"))
    values["order"]["vocabulary"] = _digest(newest.vocabulary())
    return values


def _add_split(values: Values, name: str, cache: ActivationCache, split: CacheSplit) -> None:
    sides = [f"{site.name}/{side}" for site in cache.sites.values() for side in site.sides]
    units = [split.read_unit(unit, [*PROVENANCE, *sides]) for unit in range(split.n_units)]
    rows = {key: np.concatenate([unit[key] for unit in units]) for key in units[0]}
    contexts = np.arange(split.n_contexts)
    values["order"][name] = {
        "rows": {key: _digest(rows[key]) for key in PROVENANCE},
        "n_rows": split.n_rows,
        "contexts": [_digest(split.context_tokens(contexts)), _digest(split.context_documents(contexts))],
        "sites": {site.name: [site.hook_in, site.hook_out, site.dtype] for site in cache.sites.values()},
        "served": {f"seed {seed}": _digest(served_rows(split, seed)) for seed in (0, 3)},
    }
    values["stored"][name] = {key: _digest(as_float32(rows[key])) for key in sides}
    for key in sides:
        values["numbers"][f"{name}/{key}"] = float(np.abs(as_float32(rows[key])).mean())
        site, side = key.rsplit("/", 1)
        values["numbers"][f"{name}/{key} norm"] = split.statistics(site, side).mean_norm  # type: ignore[arg-type]


def served_rows(split: CacheSplit, seed: int) -> np.ndarray:
    """Return context and position of every row, in the order in which two epochs of ``seed`` serve them."""
    with split.stream(["context", "position"], batch_rows=32, seed=seed, n_epochs=2) as stream:
        batches = [np.stack([batch.arrays["context"], batch.arrays["position"]]).astype(np.int64) for batch in stream]
    return np.ascontiguousarray(np.concatenate(batches, axis=1))


def _transcoder(path: Path) -> Values:
    return _weights(path, TranscoderManifest.read(path), load_transcoder)


def _cross_layer(path: Path) -> Values:
    return _weights(path, CrossLayerManifest.read(path), load_cross_layer)


def _weights(path: Path, manifest: AnyTranscoderManifest, load: Callable[..., Any]) -> Values:
    recorded = manifest.as_json()
    files = [name for name in sorted(manifest.files) if _is_weights(name)]
    states = {name: load(path, name).state_dict() for name in files}
    order = {
        "architecture": recorded["architecture"],
        "d_sae": manifest.d_sae,
        "sites": recorded.get("sites") or recorded["site"],
        "shapes": {name: {key: list(one.shape) for key, one in state.items()} for name, state in states.items()},
    }
    stored = {name: {key: _digest(one.numpy()) for key, one in state.items()} for name, state in states.items()}
    layers = (isinstance(manifest, CrossLayerManifest) and manifest.layers) or [manifest.metrics.heldout]
    return _values(order, stored, {f"fvu {place}": layer.get("fvu") for place, layer in enumerate(layers)})


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.endswith("sparsity.safetensors")


def _asked(path: Path) -> Values:
    """Read what SQL is asked of: tables, a sweep's runs, an evaluation's tokens."""
    listed = query.list_tables(path).to_pylist()
    views = sorted({one["table"] for one in listed} - {"labels", "metrics", "timing"})  # no part of it
    columns = {
        view: ", ".join(f"{one['column']} {one['type']}" for one in listed if one["table"] == view) for view in views
    }
    rows = {view: query.select(f"SELECT * FROM {view}", path).to_pylist() for view in views}
    return _values(
        {"columns": columns, "n_rows": {view: len(rows[view]) for view in views}},
        {view: _digest(rows[view]) for view in views},
        {},
    )


def _parquet(path: Path) -> Values:
    files = sorted(path.glob("*.parquet"))
    return _values(
        {file.name: str(read_schema(file).remove_metadata()) for file in files},
        {file.name: _digest(read_table(file).to_pylist()) for file in files},
        {},
    )


def _circuit(path: Path) -> Values:
    document = circuit.read_result(path).document
    return _values(sorted(document), _digest(document), {"root": document["root"]["value"]})


def _draw(path: Path) -> Values:
    key = unseal(path / KEY, Manifest.read(path, "blind-comparison").as_json()["commitment"])
    return _values(key["items"], _digest(key), {})


def _files(path: Path) -> Values:
    """Read what has no reader of ours but its manifest: the files are another tool's, or a browser's."""
    return _values(sorted(MANIFESTS[str(published_kind(path))].read(path).files), {}, {})


_KINDS: list[type[Manifest]] = [CacheManifest, EpochManifest, TaskManifest, *(kind for kind, _ in SUMMARIES.values())]
MANIFESTS = {kind.of_kind: kind for kind in _KINDS}
"""What reads the manifest of each kind."""

_READERS: dict[str, Callable[[Path], Values]] = {
    "activation-cache": _cache,
    "shuffled-epoch": _files,
    "transcoder": _transcoder,
    "transcoders": _parquet,
    "cross_layer_transcoder": _cross_layer,
    "sweep": _asked,
    "tables": _asked,
    "evaluation": _asked,
    "circuit": _circuit,
    "task": _parquet,
    "blind-comparison": _draw,
    "dashboard": _files,
    "export": _files,
}


def is_inside(name: str, outputs: Collection[str]) -> bool:
    """Tell whether an artifact is one of ``outputs``, or a part of one."""
    return any(name == output or name.startswith(f"{output}/") for output in outputs)
