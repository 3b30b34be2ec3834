"""Processes forked from a server that has imported everything, with ``tests/faults/faults.c`` preloaded and idle.

The imports take seconds, and forking the test process itself, with its threads, is not safe. All tests of a process
share the server.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def forked() -> Any:
    """Return what starts processes as ``multiprocessing`` does, forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    library = fault_library()
    if library is not None:
        os.environ["LD_PRELOAD"] = str(library)
    try:
        with chdir(ROOT):  # what the server imports from
            forkserver.ensure_running()
    finally:
        os.environ.pop("LD_PRELOAD", None)
    return context


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fault-library-")


@functools.cache
def fault_library() -> Path | None:
    """Return the compiled ``faults.c``, or None on a machine that has no Linux or no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = Path(_folder().name) / "faults.so"
    source = ROOT / "tests/faults/faults.c"
    subprocess.run([compiler, "-O1", "-fPIC", "-shared", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library
