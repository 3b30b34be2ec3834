"""Loops over rows, compiled at their first use, for work that takes NumPy and torch several passes.

Compiled code is kept beside the source, or in the user's cache directory, so that only the first process waits for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from functools import cached_property, update_wrapper
from typing import Any


class CompiledLoop:
    """A function that numba compiles when it is first called. It releases the GIL while it runs."""

    def __init__(self, function: Callable[..., Any], fastmath: Collection[str]) -> None:
        update_wrapper(self, function)
        self._function, self._fastmath = function, set(fastmath)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        # half a second, which commands that compile nothing need not spend
        compile_function: Any = importlib.import_module("numba").njit
        # Python's rule that dividing by zero raises would keep every loop with a division from being vectorised
        options = {"nogil": True, "fastmath": self._fastmath or False, "error_model": "numpy"}
        try:
            compiled: Callable[..., Any] = compile_function(cache=True, **options)(self._function)
        except RuntimeError:  # no cache directory can be written to
            compiled = compile_function(**options)(self._function)
        return compiled

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled function."""
        return self._compiled(*arguments)


def compiled_loop(*fastmath: str) -> Callable[[Callable[..., Any]], CompiledLoop]:
    """Return a decorator; ``fastmath`` names the liberties LLVM may take, such as ``reassoc`` with a sum's order."""
    return lambda function: CompiledLoop(function, fastmath)
