"""Triton's programs interpreted on a CPU. Import this before anything that imports the programs."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where a program is defined

from typing import Any

from triton.runtime import interpreter

_patched: set[int] = set()
"""Modules whose language is patched since the latest launch began."""
_launch = interpreter.GridExecutor.__call__


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a program from another; the language is patched once a launch, which takes longer than the call."""
    if id(function.fn.__globals__) not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(id(function.fn.__globals__))
    return function.rewrite()(*args, **kwargs)


def _start(executor: Any, *args: Any, **kwargs: Any) -> None:
    _patched.clear()
    _launch(executor, *args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
interpreter.GridExecutor.__call__ = _start
