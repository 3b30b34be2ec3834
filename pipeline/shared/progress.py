"""How far a command is: a bar in a terminal or notebook, elsewhere a plain line now and then, as in a job's log."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import click

from tailrace.pipeline.shared.units import duration

Sized = TypeVar("Sized")
Item = TypeVar("Item")

LINE_SECONDS = 30.0
"""Time between lines where no terminal watches; what is over sooner prints none."""
_SCALED = 10_000
"""Counts from here on are shown as 1.2M."""


def bar_here() -> type[Any] | None:
    """Return tqdm for a terminal, or its widget for a notebook; None where a bar would be lines of a log."""
    if "ipykernel" in sys.modules:
        name = "tqdm.auto"  # text where ipywidgets are missing
    elif sys.stderr.isatty():
        name = "tqdm"
    else:
        return None
    bar: type[Any] = importlib.import_module(name).tqdm
    return bar


class Progress:
    """Counts what is done of ``total`` things; shows nothing where ``quiet``. A context manager.

    ``done`` of them were there before, and do not enter the rate. ``update`` may be called by several threads.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, quiet: bool, done: int = 0) -> None:
        self.total, self.done, self.note = total, done, ""
        self._what, self._unit, self._before, self._quiet = what, unit, done, quiet
        self.started = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar = None
        if not quiet and (draw := bar_here()) is not None:
            scaled = total is None or total >= _SCALED
            self._bar = draw(
                total=total,
                desc=what,
                initial=done,
                unit=f" {unit}",
                unit_scale=scaled,
                smoothing=0.05,
                file=sys.stderr,
            )

    def update(self, n: int = 1, note: str | None = None) -> None:
        """Count ``n`` more; ``note`` is what else there is to say from now on."""
        with self._lock:
            self.done += n
            self.note = self.note if note is None else note
            if self._bar is not None:
                self._bar.total = self.total
                self._bar.set_postfix_str(self.note, refresh=False)
                self._bar.update(n)
            elif not self._quiet and time.monotonic() - self._said >= LINE_SECONDS:
                self._said = time.monotonic()
                click.echo(self.line(), err=True)

    def skip(self, n: int) -> None:
        """Count ``n`` that were done before."""
        with self._lock:
            self._before += n
            self.done += n
            if self._bar is not None:
                self._bar.initial += n
                self._bar.n += n
                self._bar.refresh()

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """Count every item once it has been dealt with."""
        for item in items:
            yield item
            self.update()

    def line(self) -> str:
        """Return how far it is, how fast, and how long it will take."""
        rate = (self.done - self._before) / max(1e-9, time.monotonic() - self.started)
        of_all, share = "", ""
        if self.total is not None:
            of_all, share = f"/{_count(self.total)}", f" {self.done / max(1, self.total):.0%}"
        left = "" if self.total is None or not rate else f", {duration((self.total - self.done) / rate)} left"
        speed = f"{rate:.2g}" if rate < 100 else _count(rate)
        note = f", {self.note}" if self.note else ""
        return f"{self._what}: {_count(self.done)}{of_all} {self._unit}{share}{note}, {speed} {self._unit}/s{left}"

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class RowProgress(Progress):
    """Counts rows that passed and bytes that reached the disk."""

    def __init__(self, n_rows: int | None, *, quiet: bool, title: str) -> None:
        super().__init__(n_rows, title, "rows", quiet=quiet)
        self._n_expected = 0
        self.n_bytes = 0

    @property
    def n_new_rows(self) -> int:
        """Rows that were computed now."""
        return self.done - self._before

    def expect(self, n_rows: int) -> None:
        """Count rows of a unit that is about to come; the total grows where held-out rows follow the training rows."""
        self._n_expected += n_rows
        if self.total is not None and self._n_expected > self.total:
            self.total = self._n_expected

    def watch(self, pieces: Iterator[Sized]) -> Iterator[Sized]:
        """Count the rows of every piece that passes."""
        for piece in pieces:
            self.update(len(piece))  # type: ignore[arg-type]
            yield piece

    def committed(self, n_bytes: int) -> None:
        """Count bytes of a unit that is safe on disk."""
        self.n_bytes += n_bytes
        self.update(0, f"{self.n_bytes / 1e9:.2f} GB written")


def _count(n: float) -> str:
    """Return 146 as it is, and 1200000 as 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= max(size, _SCALED):
            return f"{n / size:.3g}{unit}"
    return f"{n:,.0f}"
