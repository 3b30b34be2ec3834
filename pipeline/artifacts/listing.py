"""All artifacts under a folder: what each is, how far it came, and which were made from which.

An artifact records the digests of what it was made from, and no path. So one is used by another if both are in sight.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailrace.storage.artifact import MANIFEST, REQUEST, unreadable
from tailrace.storage.cache_format import KIND as CACHE
from tailrace.storage.draft import holds_artifact
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.formats import CROSS_LAYER_KIND, TABLES_KIND, TRANSCODER_KINDS
from tailrace.storage.names import NO_FILE, files_below
from tailrace.storage.parsing import open_regular, parse_json, read_regular

_HOLDERS = ("sweep", "transcoders")
"""Kinds whose folder has other artifacts in it."""
_NO_ARTIFACTS = {"node_modules", "__pycache__", "lost+found"}
_TAIL = 1 << 16
"""Bytes at the end of a log in which its last line of training is looked for."""


@dataclass(frozen=True)
class Listed:
    """An artifact, finished or not."""

    path: Path
    kind: str
    """As manifests have it; of an unfinished one, as far as its request tells."""
    n_bytes: int
    modified: float
    """When it was finished or, of an unfinished one, written to last, in seconds since 1970."""
    is_finished: bool
    is_damaged: bool
    """Whether there is a manifest that cannot be read."""
    facts: Mapping[str, Any]
    """Rows, features, FVU, L0 and the like by name; of an unfinished one, how far it is."""
    identities: frozenset[str] = field(repr=False)
    """Digests by which others refer to it."""
    references: frozenset[str] = field(repr=False)
    """Digests of what it was made from."""

    def uses(self, other: Listed) -> bool:
        """Return whether it was made from ``other``."""
        return other is not self and not self.references.isdisjoint(other.identities)


def list_artifacts(*folders: Path, problems: list[ArtifactCorrupt] | None = None) -> list[Listed]:
    """Return the artifacts in folders and all folders below, each once, by path; hidden folders are left out.

    What cannot be read is left out and added to ``problems``; without these, it is raised.
    """
    found: dict[Path, Listed] = {}
    for folder in folders:
        for path in _artifacts(folder, problems):
            if path.resolve() not in found:
                with _what_is_refused(path, problems):
                    found[path.resolve()] = _listed(path)
    return sorted(found.values(), key=lambda one: one.path)


@contextmanager
def _what_is_refused(path: Path, problems: list[ArtifactCorrupt] | None) -> Iterator[None]:
    """Note what the system refuses to read inside, or raise it; what another process removed is nothing to note."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        problem = unreadable(error, Path(error.filename or path))
        if problems is None:
            raise problem from error
        problems.append(problem)


def made_from(artifacts: Sequence[Listed]) -> dict[Path, list[Listed]]:
    """Return for each artifact's path those that it was made from; of copies, the one that shares most of its path."""
    holders: dict[str, list[Listed]] = {}
    for one in artifacts:
        for identity in one.identities:
            holders.setdefault(identity, []).append(one)
    origins: dict[Path, list[Listed]] = {}
    for one in artifacts:
        copies = [[other for other in holders.get(wanted, ()) if other is not one] for wanted in sorted(one.references)]
        nearest = [max(several, key=lambda other: _n_shared(one.path, other.path)) for several in copies if several]
        origins[one.path] = sorted({other.path: other for other in nearest}.values(), key=lambda other: other.path)
    return origins


def _n_shared(path: Path, other: Path) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path.parts, other.parts, strict=False))
    return sum(1 for _ in same)


def _artifacts(folder: Path, problems: list[ArtifactCorrupt] | None) -> Iterator[Path]:
    """Yield the folders of artifacts."""
    folders: list[Path] = []
    with _what_is_refused(folder, problems):
        is_artifact = _is_artifact(folder)
        if is_artifact:
            yield folder
        if not is_artifact or _holds_others(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            folders = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for inner in folders:
        if not inner.name.startswith(".") and inner.name not in _NO_ARTIFACTS:
            yield from _artifacts(inner, problems)


def _is_artifact(folder: Path) -> bool:
    """Return whether a folder is an artifact, or a run that was begun and came without its lock: by git, or a copy."""
    return holds_artifact(folder) or all((folder / name).is_file() for name in (REQUEST, "metrics.jsonl"))


def _holds_others(folder: Path) -> bool:
    manifest, request = _manifest(folder), _read(folder / REQUEST)
    return manifest.get("kind") in _HOLDERS if manifest else "runs" in request


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in a folder, an empty one if there is none that names a kind."""
    manifest = _read(folder / MANIFEST)
    return manifest if isinstance(manifest.get("kind"), str) else {}


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one if there is none; raise OSError if it cannot be read."""
    try:
        content = parse_json(read_regular(file))
    except (*NO_FILE, ValueError):
        return {}
    return _object(content)


def _listed(path: Path) -> Listed:
    manifest, request = _manifest(path), _read(path / REQUEST)
    sizes = [*_sizes(path, is_holder=_holds_others(path)).values()]
    modified = (path / MANIFEST).stat().st_mtime if manifest else max((when for _, when in sizes), default=0.0)
    return Listed(
        path,
        manifest["kind"] if manifest else _kind_of_draft(request),
        sum(n_bytes for n_bytes, _ in sizes),
        modified,
        bool(manifest),
        not manifest and (path / MANIFEST).exists(),
        known_facts(path, manifest, request),
        frozenset(str(manifest[name]) for name in ("digest", "cache_id") if name in manifest),
        frozenset(_references([[manifest.get(name) for name in ("inputs", "runs", "transcoders")], request])),
    )


def known_facts(path: Path, manifest: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to tell; nothing of a manifest or request of another shape, which its reader refuses."""
    try:
        facts = _facts(manifest) if manifest else progress(path, request)
        shown_facts(facts)
        return facts
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}


def _references(value: Any) -> Iterator[str]:
    """Yield every digest in a JSON value that names an artifact."""
    if isinstance(value, dict):
        yield from (str(value[name]) for name in ("digest", "cache_id") if isinstance(value.get(name), str))
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _references(part)


def bytes_on_disk(folder: Path) -> int:
    """Return the bytes of every file below a folder, links to the same file counted once."""
    return sum(n_bytes for n_bytes, _ in _sizes(folder, is_holder=False).values())


def _sizes(folder: Path, *, is_holder: bool) -> dict[tuple[int, int], tuple[int, float]]:
    """Return the bytes and time of each file by its device and inode. Artifacts inside a holder have their own."""
    sizes = {}
    for file in files_below(folder, but=_is_artifact if is_holder else None):
        status = file.lstat()
        sizes[status.st_dev, status.st_ino] = status.st_size, status.st_mtime
    return sizes


def _kind_of_draft(request: Mapping[str, Any]) -> str:
    """Return the kind that a request is of, as far as it tells."""
    signs = {
        CACHE: "shard_rows" in request,
        "sweep": "runs" in request,
        "transcoder": "architecture" in _object(request.get("settings")),
        "circuit": "question" in request,
        "export": "to" in request,
        TABLES_KIND: "transcoder" in _object(request.get("inputs")),
    }
    return next((kind for kind, is_there in signs.items() if is_there), "unfinished")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the few numbers by which one knows a finished artifact."""
    kind, tables = manifest["kind"], manifest.get("tables") or {}
    if kind == CACHE:
        rows = {f"{name}_rows": split["n_rows"] for name, split in manifest["splits"].items()}
        return {**rows, "sites": len(manifest["format"]["sites"])}
    if kind in TRANSCODER_KINDS:
        layers = manifest.get("layers") if kind == CROSS_LAYER_KIND else None
        measured = manifest["metrics"].get("heldout") or manifest.get("measured")
        scores = layers or ([measured] if measured else [])
        return {**_mean_scores(scores), "features": manifest["d_sae"]}
    if kind == TABLES_KIND:
        return {"features": tables["features"]["n_rows"]}
    if kind == "sweep":
        diverged = sum(run["status"] == "diverged" for run in manifest["runs"])
        return {"runs": len(manifest["runs"]), **({"diverged": diverged} if diverged else {})}
    if kind == "transcoders":
        return {"layers": len(manifest["transcoders"])}
    if kind == "evaluation":
        return {"recovered": manifest["scores"][-1].get("ce_recovered")}
    names = {"dashboard": "n_features", "circuit": "root", "export": "to", "blind-comparison": "n_items"}
    value = manifest.get(names.get(kind, ""))
    return {} if value is None else {names[kind].removeprefix("n_"): value["text"] if kind == "circuit" else value}


def _mean_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean FVU, of rows that may be learnt from, and L0."""
    means = {}
    for name, keys in (("fvu", ("fvu_ordinary", "fvu")), ("l0", ("l0",))):
        values = [next((score[key] for key in keys if score.get(key) is not None), None) for score in scores]
        known = [value for value in values if value is not None]
        if known:
            means[name] = sum(known) / len(known)
    return means


def progress(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far an unfinished artifact is: steps and last loss of a run, finished units of a cache."""
    if (path / "commits").is_dir():
        return {"units": sum(file.match("*-unit-*.json") for file in files_below(path / "commits"))}
    last = _last_of_training(path / "metrics.jsonl")
    if last is None:
        return {}
    settings = request.get("settings") or {}
    steps = settings.get("steps")
    if steps is None and settings.get("rows") is not None:
        steps = -(-settings["rows"] // settings["batch_rows"])
    done = {"step": last["step"], **({"loss": last["loss"]} if "loss" in last else {})}
    return {**done, **({} if steps is None else {"steps": steps, "share": last["step"] / steps})}


def _last_of_training(log: Path) -> dict[str, Any] | None:
    """Return the last line of a run's log that is of training."""
    try:
        with open_regular(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read(_TAIL).splitlines()
    except (*NO_FILE, ValueError):
        return None
    for line in reversed(lines):
        try:
            content = parse_json(line)
        except ValueError:  # cut off at either end
            continue
        if isinstance(content, dict) and content.get("split") == "train" and "step" in content:
            return content
    return None


def shown_facts(facts: Mapping[str, Any]) -> str:
    """Return the numbers by which one knows an artifact, or how far it is."""
    known = {name: value for name, value in facts.items() if value is not None}
    shown: dict[str, Callable[[Any], str]] = {
        "train_rows": lambda value: f"{value:,} rows",
        "heldout_rows": lambda value: f"{value:,} held out",
        "fvu": lambda value: f"FVU {value:.3f}",
        "l0": lambda value: f"L0 {value:.1f}",
        "share": lambda value: f"{value:.0%}",
        "step": lambda value: f"step {value:,}" + (f" of {known['steps']:,}" if "steps" in known else ""),
        "loss": lambda value: f"loss {value:.3g}",
        "units": lambda value: f"{value:,} unit{'s' * (value != 1)} of rows",
        "recovered": lambda value: f"{value:.1%} recovered",
        "root": str,
        "to": lambda value: f"for {value}",
    }
    counts = ("sites", "features", "runs", "layers", "diverged", "items")
    parts = [show(known[name]) for name, show in shown.items() if name in known]
    parts += [f"{known[name]:,} {name[:-1] if known[name] == 1 else name}" for name in counts if name in known]
    return ", ".join(parts)
