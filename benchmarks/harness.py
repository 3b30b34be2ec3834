"""Timing contenders against each other on a machine that is never quiet.

In every round each contender runs once, in an order drawn anew, so that whatever else the machine does falls on all
of them. A ratio is the median over rounds of the ratio inside a round, not the ratio of two medians: the speed of a
shared disk drifts by more than most differences worth knowing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a contender did: an amount (bytes, rows) and, where it timed itself, the seconds it took."""

    amount: float
    seconds: float | None = None


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to do the job. ``prepare`` and ``clear`` run untimed before and after every run."""

    name: str
    run: Callable[[], Work]
    prepare: Callable[[], None] = _nothing
    clear: Callable[[], None] = _nothing


@dataclass
class Rates:
    """Amount per second of every contender, round by round."""

    by_name: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return the median rate of one contender."""
        return statistics.median(self.by_name[name])

    def ratio(self, name: str, to: str) -> float:
        """Return the median over rounds of one contender's rate over another's."""
        return statistics.median(self._ratios(name, to))

    def spread(self, name: str, to: str) -> str:
        """Return the smallest and largest ratio of any round."""
        ratios = self._ratios(name, to)
        return f"{min(ratios):.2f}–{max(ratios):.2f}"

    def _ratios(self, name: str, to: str) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.by_name[name], self.by_name[to], strict=True)]

    def update(self, other: Rates) -> None:
        """Add the contenders of another measurement."""
        self.by_name.update(other.by_name)


def measure(contenders: Sequence[Contender], rounds: int, seed: int = 0) -> Rates:
    """Run every contender once per round, in random order; return their rates."""
    generator = np.random.Generator(np.random.Philox(seed))
    rates = Rates({contender.name: [] for contender in contenders})
    for _ in range(rounds):
        for index in generator.permutation(len(contenders)).tolist():
            contender = contenders[index]
            contender.prepare()
            start = time.perf_counter()
            work = contender.run()
            seconds = time.perf_counter() - start
            contender.clear()
            rates.by_name[contender.name].append(work.amount / (work.seconds or seconds))
    return rates


def processor_time(call: Callable[[], object]) -> Work:
    """Return one call and the processor time it took: other work of the machine is no part of it."""
    start = time.process_time()
    call()
    return Work(1, time.process_time() - start)


def forget_cached(paths: Iterable[Path]) -> None:
    """Make the kernel drop these files' pages, so that reading them next is reading the disk.

    POSIX_FADV_DONTNEED drops clean pages only, hence the sync first. Needs no privileges and leaves other files alone.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm_cache(paths: Iterable[Path]) -> None:
    """Read files once, so that reading them next is reading memory."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
