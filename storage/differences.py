"""In what two JSON values differ, in as few lines as tell it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DIGEST = re.compile(r"(\w+:[0-9a-f]{12})[0-9a-f]{20,}")
_NAMED = 3
"""Parts that are named where many differ alike; as many have a line each."""


@dataclass(frozen=True)
class _Leaf:
    """A place in which the values differ."""

    path: tuple[str, ...]
    said: str
    is_digest: bool = False

    def alike(self) -> tuple[tuple[str, ...], str]:
        """Return what leaves of the parts of one object share if one line tells them: digests are never equal."""
        return self.path, "" if self.is_digest else self.said

    def line(self) -> str:
        """Return the name of the place and both values."""
        return f"{'.'.join(self.path)}: {self.said}"


def list_differences(found: Any, wanted: Any) -> list[str]:
    """Return a line for every leaf in which two JSON values differ, naming it with both values; digests are shortened.

    Of an object with nothing on the other side only the name is told: its leaves are no one's mistake. Where more than
    three parts of an object differ in the same way (all runs of a sweep, the transcoders of all layers), one line
    tells it, with ``*`` for the part's name.
    """
    return [leaf.line() for leaf in _leaves(found, wanted)]


def _leaves(found: Any, wanted: Any) -> list[_Leaf]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return list(_leaves_of_object(found, wanted))
    if isinstance(found, dict) and wanted is None:
        return [_Leaf((), "is there, not asked for")]
    if isinstance(wanted, dict) and found is None:
        return [_Leaf((), "is not there, asked for")]
    if found == wanted:
        return []
    is_digest = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (found, wanted))
    return [_Leaf((), f"there it is {_shown(found)}, asked for {_shown(wanted)}", is_digest)]


def _leaves_of_object(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[_Leaf]:
    inside = {key: _leaves(found.get(key), wanted.get(key)) for key in sorted(found.keys() | wanted.keys())}
    parts: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for key, leaves in inside.items():
        if isinstance(found.get(key, wanted.get(key)), dict):
            for leaf in leaves:
                parts.setdefault(leaf.alike(), []).append(key)
    told = set()
    for key, leaves in inside.items():
        for leaf in leaves:
            names = parts.get(leaf.alike(), [])
            if len(names) <= _NAMED or key not in names:
                yield _Leaf((key, *leaf.path), leaf.said, leaf.is_digest)
            elif leaf.alike() not in told:
                told.add(leaf.alike())
                said = "there it is another than asked for" if leaf.is_digest else leaf.said
                where = f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
                yield _Leaf(("*", *leaf.path), f"{said} ({where})")


def _shown(value: Any) -> str:
    """Return a value as it is written, a digest by its first twelve characters."""
    return _DIGEST.sub(r"\1…", repr(value))
