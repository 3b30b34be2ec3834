"""Folders that hold an artifact for each layer, such as those ``pipeline circuits-model`` makes, given as one path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from storage.artifact import MANIFEST, read_json


def each_artifact(paths: Sequence[Path], kind: str) -> list[Path]:
    """Return ``paths``; one that is no artifact of ``kind`` but a folder that holds some stands for all of these.

    They come in the order of the numbers in their names: layer 10 after layer 9. Other things in the folder are left
    out. A path at which there is nothing is returned as it is, for its reader to complain about.
    """
    found: list[Path] = []
    for path in paths:
        inside = [one.parent for one in path.glob(f"*/{MANIFEST}") if _is_of_kind(one, kind)]
        is_folder = bool(inside) and not _is_of_kind(path / MANIFEST, kind)
        found += sorted(inside, key=_by_number) if is_folder else [path]
    return found


def _is_of_kind(manifest: Path, kind: str) -> bool:
    if not manifest.is_file():
        return False
    content = read_json(manifest)
    return isinstance(content, dict) and content.get("kind") == kind


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return a key by which numbers inside names sort as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
