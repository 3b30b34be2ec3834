"""Folders that hold many artifacts of one kind, such as a transcoder for each layer or a sweep's runs, as one path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tailrace.storage.artifact import MANIFEST, REQUEST, published_kind
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.formats import TRANSCODER_KINDS
from tailrace.storage.names import by_number, home_path, matching, path_problem
from tailrace.storage.parsing import shown

PathLike = str | os.PathLike[str]
"""A path, as a string or a ``Path``."""
Paths = PathLike | Sequence[PathLike]
"""One path or several."""
RUNS = "runs"
"""Folder in which a sweep keeps its transcoders; spelled out, because the module that makes it loads torch."""
_NAMED = 40
"""Artifacts whose names a message lists."""


def as_path(path: PathLike) -> Path:
    """Return a path as a caller in Python writes it, where no shell reads ``~``.

    Raises SettingsError for what no system has.
    """
    expanded = home_path(path)
    if (problem := path_problem(expanded)) is not None:
        raise SettingsError(f"{shown(str(expanded))}: {problem}; give another path")
    return expanded


def as_paths(paths: Paths) -> list[Path]:
    """Return one path or several as a list."""
    return [as_path(paths)] if isinstance(paths, str | os.PathLike) else [as_path(path) for path in paths]


def each_artifact(paths: Sequence[Path], *kinds: str) -> list[Path]:
    """Return ``paths``; one that is no artifact of ``kinds`` but a folder that holds some stands for all of these.

    They come in the order of the numbers in their names: layer 10 after layer 9. Other things in the folder are left
    out. A path at which there is nothing is returned as it is, for its reader to complain about.
    """
    found: list[Path] = []
    for path in paths:
        found += artifacts_inside(path, *kinds) or [path]
    return found


def transcoder_paths(paths: Path | Sequence[Path]) -> list[Path]:
    """Return ``paths``; a folder that holds transcoders, of either kind, stands for all of them."""
    return each_artifact([paths] if isinstance(paths, Path) else paths, *TRANSCODER_KINDS)


def artifacts_inside(path: Path, *kinds: str) -> list[Path]:
    """Return the artifacts of ``kinds`` in a folder, or in a sweep's folder of runs; none for one that is such itself.

    Those that were never finished are not among them.
    """
    if published_kind(path) in kinds:
        return []
    inside = [one.parent for one in _entries(path, MANIFEST) if published_kind(one.parent) in kinds]
    return sorted(inside, key=lambda one: by_number(one.name))


def unfinished_inside(path: Path) -> list[Path]:
    """Return the artifacts in a folder, or in a sweep's folder of runs, that were begun and never finished."""
    begun = [one.parent for one in _entries(path, REQUEST) if not (one.parent / MANIFEST).exists()]
    return sorted(begun, key=lambda one: by_number(one.name))


def refuse_folder(path: Path, kind: str) -> None:
    """Raise ArtifactMismatch, with those to choose from, if ``path`` is a folder that holds artifacts of ``kind``.

    For what needs a single one.
    """
    if inside := artifacts_inside(path, kind):
        names = ", ".join(str(one.relative_to(path)) for one in inside[:_NAMED])
        more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
        raise ArtifactMismatch(
            f"{path}: holds {kind.removesuffix('s')}s in {len(inside)} folder{'s' if len(inside) > 1 else ''}, wanted "
            f"those of one; give one of {names}{more}, as {inside[0]}"
        )


def _entries(path: Path, name: str) -> list[Path]:
    return [*matching(path, f"*/{name}"), *matching(path, f"{RUNS}/*/{name}")]
