"""``pipeline info``: any artifact at a glance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailrace.pipeline.artifacts.info_summaries import GLANCES, hooks_of
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import MANIFEST, REQUEST, read_json, read_sealed
from tailrace.storage.cache_format import KIND, PROVENANCE, SPLITS
from tailrace.storage.errors import ArtifactMissing


def glance(path: Path) -> dict[str, Any]:
    """Return the few things one wants to know of what lies at ``path``; ``describe`` has everything.

    Raises ArtifactMissing if nothing does.
    """
    described = describe(path)
    shown = GLANCES.get(described.get("kind", ""))
    return described if shown is None else dict(shown(read_sealed(path / MANIFEST)))


def describe(path: Path) -> dict[str, Any]:
    """Return what lies at ``path`` as names and values, ready to be printed or dumped as JSON.

    Raises ArtifactMissing if nothing does.
    """
    if not (path / MANIFEST).exists():
        if (path / REQUEST).exists():
            return {
                "state": "unfinished: run the command that makes it again to continue",
                **_progress(path),
                "request": read_json(path / REQUEST),
            }
        if inside := sorted(path.glob(f"*/{MANIFEST}")):
            return {
                "state": f"a folder of {len(inside)} artifacts; name one of them",
                **{one.parent.name: read_sealed(one).get("kind") for one in inside},
            }
        raise ArtifactMissing(f"{path}: no cache, transcoder, tables or other artifact lies here; check the path")
    manifest = read_sealed(path / MANIFEST)
    if manifest["kind"] == KIND:
        return dict(_describe_cache(open_cache(path)))
    return {name: value for name, value in manifest.items() if name not in ("files", "digest")}


def _progress(draft: Path) -> dict[str, int]:
    """Return how far an unfinished cache or training run has come; nothing for what is made in one go."""
    from tailrace.training.architectures.transcoder import CHECKPOINTS
    from tailrace.training.loop.checkpoint import (
        Checkpoints,  # loads torch, which no finished artifact needs to be shown
    )

    if (draft / CHECKPOINTS).is_dir():
        return {"steps kept": max(Checkpoints(draft / CHECKPOINTS).steps(), default=0)}
    if (draft / "commits").is_dir():
        return {"finished units": len(list((draft / "commits").rglob("*-unit-*.json")))}
    return {}


def _describe_cache(cache: ActivationCache) -> Iterator[tuple[str, Any]]:
    manifest = cache.manifest
    yield "kind", manifest["kind"]
    yield "cache id", f"{cache.cache_id}, generation {cache.generation}"
    yield "model", f"{manifest['model']['name']} ({manifest['model'].get('dtype', '?')})"
    yield "text", manifest["text"].get("dataset") or manifest["request"].get("dataset")
    yield "context length", cache.layout.context_length
    yield "rows per shard", cache.layout.shard_rows
    for name in (name for name in SPLITS if name in manifest["splits"]):
        split = cache.split(name)
        yield f"{name} rows", split.n_rows
        yield f"{name} contexts", split.n_contexts
    sums = cache.split("train").output_statistics()
    for site in cache.sites.values():
        statistics = sums[site.name]
        yield (
            f"site {site.name}",
            f"{hooks_of(site)}, {site.dtype}; "
            f"mean output norm {statistics.mean_norm:.4g}, "
            f"largest 1 % of rows hold {statistics.energy_share():.0%} of the output energy",
        )
    yield "bytes on disk", _bytes_on_disk(cache.path)
    yield "provenance", ", ".join(PROVENANCE)
    epochs = sorted(epoch.name for epoch in (cache.path / "epochs").glob("*") if (epoch / MANIFEST).exists())
    if epochs:
        yield "materialised epochs", ", ".join(epochs)


def _bytes_on_disk(path: Path) -> int:
    """Return the bytes of every file, links to the same file counted once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            status = (Path(folder) / name).stat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())
