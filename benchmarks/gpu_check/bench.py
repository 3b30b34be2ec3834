"""Where checks run: a device, a scratch folder, a clock, and stand-ins for what is not installed."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from logging import INFO, Handler, LogRecord, getLogger
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check.outcomes import NotHereError

SHIM = "tests.support.pretended_gpu"


class Timing(NamedTuple):
    """Seconds of a call."""

    device: float
    """Median, by the device's own clock."""
    wall: float
    """Mean of many calls that nothing waits between, by the host's clock."""


@dataclass(frozen=True)
class Bench:
    """A device and what goes with it."""

    device: str
    """As torch names it."""
    folder: Path
    """Scratch."""
    peers: Path | None = None
    """Folder of other projects' packages."""
    small: bool = False
    """Sizes that show nothing but that the code runs."""
    offered: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Inside, the device is there: nothing for a real one."""

    @property
    def is_cuda(self) -> bool:
        """Whether the device has a clock, a memory and programs of its own: a GPU that is no pretended one."""
        return self.device.startswith("cuda") and not self.small and self.offered is nullcontext

    def time(self, call: Callable[[], object], n: int = 20, warm: int = 5) -> Timing:
        """Time ``n`` calls, after ``warm`` that are not counted."""
        if self.small:
            n, warm = 2, 1
        for _ in range(warm):
            call()
        self.wait()
        if not self.is_cuda:
            started = time.perf_counter()
            for _ in range(n):
                call()
            seconds = (time.perf_counter() - started) / n
            return Timing(seconds, seconds)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        started = time.perf_counter()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        self.wait()
        wall = (time.perf_counter() - started) / n
        apart = [first.elapsed_time(last) / 1e3 for first, last in itertools.pairwise(marks)]
        return Timing(statistics.median(apart), wall)

    def wait(self) -> None:
        """Wait until the device has done all it was asked for."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Give free memory back and count the peak anew."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """Return the largest memory in use since ``forget_peak``; None on a CPU, where nothing counts it."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.is_cuda else None

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a new folder for a check."""
        folder = self.folder / name.replace(" ", "-").replace("/", "-").replace(",", "")
        folder.mkdir(parents=True)
        yield folder


@contextmanager
def log_lines(logger: str) -> Iterator[list[str]]:
    """Collect what a part of the project logs."""
    lines: list[str] = []

    class Collect(Handler):
        def emit(self, record: LogRecord) -> None:
            lines.append(record.getMessage())

    target, handler = getLogger(logger), Collect()
    before = target.level
    target.addHandler(handler)
    target.setLevel(INFO)
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(before)


class _NothingRecorded:
    """Stands for what a pretended GPU writes down: a real one writes nothing."""

    is_kept = False

    def __init__(self) -> None:
        self.waits: Counter[Any] = Counter()
        self.copies: Counter[Any] = Counter()

    def clear(self) -> None:
        """Do nothing."""


def _limit(**machine: Any) -> None:
    """Refuse to make a real machine smaller."""
    if machine:
        raise NotHereError("is about a machine smaller than this one, which only a pretended one can be")


def leave_pretended_gpu_out() -> None:
    """Let the cases of tests/support be imported beside a real GPU: the shim they begin with would replace it."""
    stand_in: Any = ModuleType(SHIM)
    stand_in.pretended_gpu, stand_in.record, stand_in.limit = nullcontext, _NothingRecorded(), _limit
    sys.modules[SHIM] = stand_in


def replace_numba() -> bool:
    """Where numba is not installed, run its loops uncompiled, a thousand times slower; return whether that is so."""
    if importlib.util.find_spec("numba") is not None:
        return False

    def njit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda later: later) if function is None else function

    stand_in: Any = ModuleType("numba")
    stand_in.__spec__ = ModuleSpec("numba", None)  # what asks whether numba is there needs not fail
    stand_in.njit = njit
    sys.modules["numba"] = stand_in
    return True
