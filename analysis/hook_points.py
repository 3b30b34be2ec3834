"""Hook points of a TransformerLens model: how a hook is named, and hook functions that are gone again afterwards.

A name is one that TransformerLens knows, or such a name with the index of an attention head behind it in brackets,
``blocks.3.attn.hook_z[5]``. Several names may mean the same point (``blocks.0.hook_mlp_out`` and
``blocks.0.mlp.hook_out`` in most families), so points are compared as objects, never by name.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

_NAME = re.compile(r"(?P<point>[^\[\]]+)(?:\[(?P<head>\d+)\])?")
_LEVELS = itertools.count(800_000_000)
"""Tells the hooks of one context from everybody else's, nested ones of ours included; far from TransformerLens's own
levels, which count its open contexts."""

HookFunction = Callable[..., Any]
"""``f(value, *, hook)``; what it returns replaces the value, None leaves it."""


class HookAddress(NamedTuple):
    """A hook point by name, and the attention head whose slice is meant; None for all of it."""

    point: str
    head: int | None


def parse_hook(name: str) -> HookAddress | None:
    """Return what a hook's name means; None if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    # Head 0 is a head: only a missing index means the whole hook.
    return HookAddress(match["point"], None if match["head"] is None else int(match["head"]))


def name_problem(name: str, points: Mapping[str, Any]) -> str | None:
    """Return a sentence if ``name`` is no hook of the model whose hook points are ``points``."""
    address = parse_hook(name)
    if address is not None and address.point in points:
        return None
    near = difflib.get_close_matches(address.point if address else name, list(points), n=3, cutoff=0.6)
    advice = f"near matches: {', '.join(near)}" if near else "names look like blocks.0.mlp.hook_out or …hook_z[5]"
    return f"this model has no hook {name!r}; {advice}"


@contextlib.contextmanager
def hooked(functions: Sequence[tuple[Any, HookFunction]]) -> Iterator[None]:
    """Add (hook point, function) pairs in order, and take away exactly these on leaving, whatever happens."""
    level = next(_LEVELS)
    try:
        for point, function in functions:
            point.add_hook(function, level=level)
        yield
    finally:
        for point, _ in functions:
            point.remove_hooks("fwd", level=level)


@contextlib.contextmanager
def observed(points: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the value of each hook point as it last fired inside; the tensors are the model's own."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> HookFunction:
        def note(value: Tensor, *, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
            seen[name] = value

        return note

    with hooked([(points[name], keep(name)) for name in names]):
        yield seen
