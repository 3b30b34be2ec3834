"""The progress bar of a stage that writes rows: rows per second, bytes written, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

Sized = TypeVar("Sized")


class RowProgress:
    """Counts rows that passed and bytes that reached the disk; draws a bar unless ``quiet`` or not a terminal."""

    def __init__(self, n_rows: int | None, *, quiet: bool, title: str) -> None:
        self._bar = tqdm(
            total=n_rows,
            desc=title,
            unit=" tok",
            unit_scale=True,
            disable=True if quiet else None,  # None: unless a terminal watches
            smoothing=0.05,
            file=sys.stderr,
            mininterval=0.5,
        )
        self._lock = threading.Lock()
        self._n_expected = 0
        self.n_new_rows = 0
        self.n_bytes = 0
        self.started = time.monotonic()

    def expect(self, n_rows: int) -> None:
        """Count rows of a unit that is about to come; the total grows where held-out rows follow the training rows."""
        with self._lock:
            self._n_expected += n_rows
            if self._bar.total is not None and self._n_expected > self._bar.total:
                self._bar.total = self._n_expected

    def watch(self, pieces: Iterator[Sized]) -> Iterator[Sized]:
        """Count the rows of every piece that passes."""
        for piece in pieces:
            n = len(piece)  # type: ignore[arg-type]
            self.passed(n)
            yield piece

    def passed(self, n_rows: int) -> None:
        """Count rows that were computed now."""
        with self._lock:
            self.n_new_rows += n_rows
            self._bar.update(n_rows)

    def skipped(self, n_rows: int) -> None:
        """Count rows that were there already; they do not enter the rate."""
        with self._lock:
            if self._bar.disable:  # then it lacks half of its attributes
                return
            self._bar.initial += n_rows
            self._bar.n += n_rows
            self._bar.refresh()

    def committed(self, n_bytes: int) -> None:
        """Count bytes of a unit that is safe on disk."""
        with self._lock:
            self.n_bytes += n_bytes
            self._bar.set_postfix_str(f"{self.n_bytes / 1e9:.2f} GB written")

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
