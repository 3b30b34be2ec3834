"""What commands import, all of it, so that processes forked from one that has it need not."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import datasets  # noqa: F401
import duckdb  # noqa: F401
import numba
import transformer_lens.model_bridge  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import zarrs  # noqa: F401

import tailrace.pipeline
import tests.faults.lab  # noqa: F401

for module in pkgutil.walk_packages(tailrace.pipeline.__path__, "tailrace.pipeline."):
    importlib.import_module(module.name)
compile_function: Any = numba.njit
compile_function(lambda: 0)()  # its compiler is imported at the first use
