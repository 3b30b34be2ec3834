"""Folders that hold many artifacts of one kind, such as a transcoder for each layer or a sweep's runs, as one path."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tailrace.storage.artifact import MANIFEST, REQUEST, read_json
from tailrace.storage.errors import ArtifactMismatch, SettingsError

if TYPE_CHECKING:
    from tailrace.storage.cache_format import Site
    from tailrace.training.architectures.base import Transcoder

PathLike = str | os.PathLike[str]
"""A path, as a string or a ``Path``."""
Paths = PathLike | Sequence[PathLike]
"""One path or several."""
RUNS = "runs"
"""Folder in which a sweep keeps its transcoders; spelled out, because the module that makes it loads torch."""
_NAMED = 40
"""Artifacts whose names a message lists."""


def as_path(path: PathLike) -> Path:
    """Return a path as a caller in Python writes it, where no shell reads ``~``."""
    return Path(path).expanduser()


def as_paths(paths: Paths) -> list[Path]:
    """Return one path or several as a list."""
    return [as_path(paths)] if isinstance(paths, str | os.PathLike) else [as_path(path) for path in paths]


def each_artifact(paths: Sequence[Path], kind: str) -> list[Path]:
    """Return ``paths``; one that is no artifact of ``kind`` but a folder that holds some stands for all of these.

    They come in the order of the numbers in their names: layer 10 after layer 9. Other things in the folder are left
    out. A path at which there is nothing is returned as it is, for its reader to complain about.
    """
    found: list[Path] = []
    for path in paths:
        found += artifacts_inside(path, kind) or [path]
    return found


def load_transcoders(paths: Paths) -> dict[Site, Transcoder]:
    """Return transcoders of one layer each by their sites, as ``replaced`` and circuits take them.

    A folder stands for the transcoders in it. Raises SettingsError for two of one site, and ArtifactError.

    ``((site, transcoder),) = tailrace.load_transcoders("transcoders/gpt2").items()``
    """
    from tailrace.storage.cache_format import Site
    from tailrace.training.architectures.transcoder import KIND, load_transcoder, read_transcoder_manifest  # torch

    by_site: dict[Site, Path] = {}
    for path in each_artifact(as_paths(paths), KIND):
        site = Site(**read_transcoder_manifest(path)["site"])
        if site in by_site:
            raise SettingsError(f"{by_site[site]} and {path} are both of site {site.name}; give one of them")
        by_site[site] = path
    return {site: load_transcoder(path) for site, path in by_site.items()}


def artifacts_inside(path: Path, kind: str) -> list[Path]:
    """Return the artifacts of ``kind`` in a folder, or in a sweep's folder of runs; none for one that is such itself.

    Those that were never finished are not among them.
    """
    if _is_of_kind(path / MANIFEST, kind):
        return []
    inside = [one.parent for one in _entries(path, MANIFEST) if _is_of_kind(one, kind)]
    return sorted(inside, key=_by_number)


def unfinished_inside(path: Path) -> list[Path]:
    """Return the artifacts in a folder, or in a sweep's folder of runs, that were begun and never finished."""
    begun = [one.parent for one in _entries(path, REQUEST) if not (one.parent / MANIFEST).exists()]
    return sorted(begun, key=_by_number)


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
    return [*path.glob(f"*/{name}"), *path.glob(f"{RUNS}/*/{name}")]


def _is_of_kind(manifest: Path, kind: str) -> bool:
    if not manifest.is_file():
        return False
    content = read_json(manifest)
    return isinstance(content, dict) and content.get("kind") == kind


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return a key by which numbers inside names sort as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
