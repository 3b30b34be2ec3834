"""``pipeline info``: any artifact at a glance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from storage.activation_cache import ActivationCache, open_cache
from storage.artifact import MANIFEST, REQUEST, read_json, read_sealed
from storage.cache_format import KIND, PROVENANCE, SPLITS, Site
from storage.errors import ArtifactMissing
from training.checkpoint import Checkpoints
from training.transcoder import CHECKPOINTS


def glance(path: Path) -> dict[str, Any]:
    """Return the few things one wants to know of what lies at ``path``; ``describe`` has everything.

    Raises ArtifactMissing if nothing does.
    """
    described = describe(path)
    shown = _GLANCES.get(described.get("kind", ""))
    return described if shown is None else dict(shown(described))


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
        raise ArtifactMissing(f"{path}: no cache, transcoder, sweep, evaluation or tables lie here; check the path")
    manifest = read_sealed(path / MANIFEST)
    if manifest["kind"] == KIND:
        return dict(_describe_cache(open_cache(path)))
    return {name: value for name, value in manifest.items() if name not in ("files", "digest")}


def _progress(draft: Path) -> dict[str, int]:
    """Return how far an unfinished cache or training run has come; nothing for what is made in one go."""
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
            f"{_hooks(site)}, {site.dtype}; "
            f"mean output norm {statistics.mean_norm:.4g}, "
            f"largest 1 % of rows hold {statistics.energy_share():.0%} of the output energy",
        )
    yield "bytes on disk", _bytes_on_disk(cache.path)
    yield "provenance", ", ".join(PROVENANCE)
    epochs = sorted(epoch.name for epoch in (cache.path / "epochs").glob("*") if (epoch / MANIFEST).exists())
    if epochs:
        yield "materialised epochs", ", ".join(epochs)


def _hooks(site: Site) -> str:
    if len(site.sides) == 1:
        return f"{site.hook_in} ({site.d_in})"
    return f"{site.hook_in} ({site.d_in}) -> {site.hook_out} ({site.d_out})"


def _origin(manifest: dict[str, Any], sites: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What all artifacts made from rows have in common: where they come from."""
    yield "kind", manifest["kind"]
    yield "model", f"{manifest['model']['name']} ({manifest['model'].get('dtype', '?')})"
    for site in (Site(**recorded) for recorded in sites):
        yield f"site {site.name}", _hooks(site)
    if cache := manifest["inputs"].get("cache"):
        yield "cache id", f"{cache['cache_id']}, generation {cache['generation']}"
    else:
        yield "rows", "live, straight from the model"


def _glance_at_transcoder(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [manifest["site"]])
    kind, choices = manifest["architecture"]["kind"], manifest["architecture"]
    on = [name if value is True else f"{name} {value}" for name, value in choices.items() if value and name != "kind"]
    yield "architecture", ", ".join([kind, *on])
    yield "features", manifest["d_sae"]
    metrics = manifest["metrics"]
    yield "trained", f"{metrics['steps']:,} steps, {metrics['rows']:,} rows"
    if heldout := metrics.get("heldout"):
        score = f"FVU {heldout['fvu']:.4g}, L0 {heldout['l0']:.1f}, dead features {heldout['dead_fraction']:.1%}"
        yield "held out", f"{score}, over {heldout['n_rows']:,} rows"
    yield "everything else", "--json"


def _glance_at_tables(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [manifest["site"]])
    yield "transcoder", manifest["inputs"]["transcoder"]["digest"]
    yield "rows read", f"{manifest['request']['settings']['split']} rows"
    yield from _tables(manifest["tables"])
    yield "everything else", "--json"


def _tables(tables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, table in sorted(tables.items()):
        yield f"table {name}", f"{table['n_rows']:,} rows"


def _glance_at_sweep(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [])
    statuses = Counter(one["status"] for one in manifest["runs"])
    yield "runs", ", ".join(f"{n:,} {status}" for status, n in sorted(statuses.items(), reverse=True))
    yield from _tables({"runs": {"n_rows": len(manifest["runs"])}})
    yield "everything else", "--json"


def _glance_at_evaluation(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, manifest["sites"].values())
    first, split = manifest["scores"][0], manifest["request"]["settings"]["split"]
    yield "run on", f"{first['n_predictions']:,} tokens of {first['n_contexts']:,} {split} contexts"
    yield "cross entropy", f"{first['ce_original']:.4f} nats per token"
    for score in manifest["scores"]:
        share = score["ce_recovered"]
        recovered = "" if share is None else f", {share:.1%} recovered"
        yield f"with {score['name']}", f"{score['spliced']['ce']:.4f}{recovered}, KL {score['spliced']['kl']:.4f}"
    yield from _tables(manifest["tables"])
    yield "everything else", "--json"


_GLANCES = {
    "transcoder": _glance_at_transcoder,
    "tables": _glance_at_tables,
    "sweep": _glance_at_sweep,
    "evaluation": _glance_at_evaluation,
}


def _bytes_on_disk(path: Path) -> int:
    """Return the bytes of every file, links to the same file counted once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            status = (Path(folder) / name).stat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())
