"""The differences between two JSON values, in few lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DIGEST = re.compile(r"(\w+:[0-9a-f]{12})[0-9a-f]{20,}")
_NAMED = 3
"""Most parts of an object that are named in one line, and most that have a line each, where many differ alike."""


@dataclass(frozen=True)
class _Leaf:
    """A path at which the values differ, and how."""

    path: tuple[str, ...]
    difference: str
    is_digest: bool = False

    def alike(self) -> tuple[tuple[str, ...], str]:
        """Return a key that is equal for leaves that one line reports: digests differ each in its own way."""
        return self.path, "" if self.is_digest else self.difference

    def line(self) -> str:
        """Return the path and both values."""
        return f"{'.'.join(self.path)}: {self.difference}"


def list_differences(existing: Any, wanted: Any) -> list[str]:
    """Return a line for every leaf in which two JSON values differ, naming it with both values; digests are shortened.

    An object with nothing on the other side is one difference, whatever it holds. Where more than three parts of an
    object differ in the same way (all runs of a sweep, the transcoders of all layers), one line reports them, with
    ``*`` for the part's name.
    """
    return [leaf.line() for leaf in _leaves(existing, wanted)]


def _leaves(existing: Any, wanted: Any) -> list[_Leaf]:
    if isinstance(existing, dict) and isinstance(wanted, dict):
        return list(_leaves_of_object(existing, wanted))
    if isinstance(existing, dict) and wanted is None:
        return [_Leaf((), "is there, not asked for")]
    if isinstance(wanted, dict) and existing is None:
        return [_Leaf((), "is not there, asked for")]
    if existing == wanted:
        return []
    is_digest = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (existing, wanted))
    return [_Leaf((), f"there it is {_shown(existing)}, asked for {_shown(wanted)}", is_digest)]


def _leaves_of_object(existing: dict[str, Any], wanted: dict[str, Any]) -> Iterator[_Leaf]:
    inside = {key: _leaves(existing.get(key), wanted.get(key)) for key in sorted(existing.keys() | wanted.keys())}
    parts: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for key, leaves in inside.items():
        if isinstance(existing.get(key, wanted.get(key)), dict):
            for leaf in leaves:
                parts.setdefault(leaf.alike(), []).append(key)
    reported = set()
    for key, leaves in inside.items():
        for leaf in leaves:
            names = parts.get(leaf.alike(), [])
            if len(names) <= _NAMED or key not in names:
                yield _Leaf((key, *leaf.path), leaf.difference, leaf.is_digest)
            elif leaf.alike() not in reported:
                reported.add(leaf.alike())
                difference = "there it is another than asked for" if leaf.is_digest else leaf.difference
                where = f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
                yield _Leaf(("*", *leaf.path), f"{difference} ({where})")


def _shown(value: Any) -> str:
    """Return a value as it is written, a digest by its first twelve characters."""
    return _DIGEST.sub(r"\1…", repr(value))
