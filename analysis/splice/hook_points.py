"""Hook points of a TransformerLens model: whether it has one, and hook functions that are gone again afterwards.

Several names may mean the same point (``blocks.0.hook_mlp_out`` and
``blocks.0.mlp.hook_out`` in most families), so points are compared as objects, never by name.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tailrace.storage.cache_format import HookName

_LEVELS = itertools.count(800_000_000)
"""Tells the hooks of one context from everybody else's, nested ones of ours included; far from TransformerLens's own
levels, which count its open contexts."""

HookFunction = Callable[..., Any]
"""``f(value, *, hook)``; what it returns replaces the value, None leaves it."""


def name_problem(name: str, points: Mapping[str, Any]) -> str | None:
    """Return a sentence if ``name`` is no hook of the model whose hook points are ``points``."""
    hook = HookName.parse(name)
    if hook.point in points and (hook.head is None or hook.head >= 0):
        return None
    near = difflib.get_close_matches(hook.point, list(points), n=3, cutoff=0.6)
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
