"""Loops over rows, compiled at their first use, for work that takes NumPy and torch several passes.

Compiled code is kept beside the source, or in the user's cache directory, so that only the first process waits for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from functools import cached_property, update_wrapper
from types import FunctionType
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
        function = self._function_of_compiled()
        try:
            compiled: Callable[..., Any] = compile_function(cache=True, **options)(function)
        except RuntimeError:  # no cache directory can be written to
            compiled = compile_function(**options)(function)
        return compiled

    def _function_of_compiled(self) -> Callable[..., Any]:
        """Return the function, calling compiled code where it calls other loops of its module, as numba wants it."""
        own = self._function.__globals__
        used = {name: own[name] for name in self._function.__code__.co_names if name in own}
        loops = {name: value._compiled for name, value in used.items() if isinstance(value, CompiledLoop)}
        if not loops:
            return self._function
        copy = FunctionType(self._function.__code__, own | loops, self._function.__name__)
        copy.__qualname__ = self._function.__qualname__  # numba keeps compiled code by it
        return copy

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled function."""
        return self._compiled(*arguments)


def compiled_loop(*fastmath: str) -> Callable[[Callable[..., Any]], CompiledLoop]:
    """Return a decorator; ``fastmath`` names the liberties LLVM may take, such as ``reassoc`` with a sum's order."""
    return lambda function: CompiledLoop(function, fastmath)
