"""Checks in every call that tests make that arrays have the shapes and types that annotations state.

Only arrays: beartype has no answer to ``Self`` and to protocols where functions are decorated, and mypy checks types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

MODULES = (
    "tailrace.training.architectures",
    *(f"tailrace.training.rows.{name}" for name in ("learnt_rows", "normalisation", "ordinary_rows")),
)
"""Modules and packages whose functions are checked. Loops that numba compiles cannot be."""

Function = TypeVar("Function", bound=Callable[..., Any])


def check(function: Function) -> Function:
    """Return ``function`` with a check of what its annotations say of arrays."""
    annotations = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in annotations.items() if _states_a_shape(hint)}
    return beartype(function)


def _states_a_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(map(_states_a_shape, get_args(hint)))
