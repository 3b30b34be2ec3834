"""One run's metrics on their way out: every line to ``metrics.jsonl``, its numbers to the loggers too.

A killed run can take up its logs again without a line lost or doubled. ``metrics.jsonl`` belongs to the artifact and
holds nothing that a rerun would give differently; what the clock says goes to ``timing.jsonl``, which is not part of
it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash

from tailrace.storage.artifact import storage_refused, sync_directory
from tailrace.storage.errors import ArtifactCorrupt, NonFiniteActivation
from tailrace.training.architectures.manifest import METRICS, TIMING
from tailrace.training.loop.curves import read_log
from tailrace.training.loop.firing_frequency import EDGES
from tailrace.training.loop.loggers import Logger, Loggers, tag


class Extent(NamedTuple):
    """What a file held when it was last made to survive a power cut."""

    n_bytes: int = 0
    checksum: str | None = None
    """Of these bytes; None where it is not known."""


NOTHING = Extent()


class JsonLines:
    """An append-only file of one JSON object per line, cut back on opening to what it held at ``extent``.

    It is open only while it is written to: a sweep has thousands. Raises ArtifactCorrupt if that is not what it begins
    with, StorageFull if the disk refuses.
    """

    def __init__(self, path: Path, extent: Extent = NOTHING) -> None:
        self.path = path
        self._checksum, self._n_bytes = xxhash.xxh3_128(), extent.n_bytes
        self._has_sure_name = False
        with self._opened(os.O_CREAT) as file:
            while block := file.read(min(extent.n_bytes - file.tell(), 1 << 20)):
                self._checksum.update(block)
            if file.tell() != extent.n_bytes or extent.checksum not in (None, self._checksum.hexdigest()):
                raise ArtifactCorrupt(
                    f"{path}: is not what the run had written at its checkpoint ({extent.n_bytes:,} bytes); restore "
                    "it, or begin anew with --fresh or at another path"
                )
            file.truncate(extent.n_bytes)

    @contextmanager
    def _opened(self, flags: int = 0) -> Iterator[BinaryIO]:
        """Yield the file; what a link leads to is not this run's to write."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | flags, 0o666)
            with os.fdopen(descriptor, "r+b") as file:
                yield file
        except OSError as error:
            raise storage_refused(error, self.path) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; keys keep their order.

        Raises NonFiniteActivation for a number that is none, StorageFull if the disk refuses.
        """
        try:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
        except ValueError as error:
            wrong = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
            raise NonFiniteActivation(
                f"after step {record.get('step')}, {', '.join(wrong) or 'a score'} is not finite: the weights have "
                "grown too large. Start afresh with a lower lr or a gradient_clip"
            ) from error
        with self._opened() as file:
            file.write(line)
        self._checksum.update(line)
        self._n_bytes += len(line)

    def commit(self) -> Extent:
        """Make all lines survive a power cut; return what the file holds."""
        with self._opened() as file:
            os.fsync(file.fileno())
            if not self._has_sure_name:
                sync_directory(self.path.parent)
                self._has_sure_name = True
        return Extent(self._n_bytes, self._checksum.hexdigest())


class RunLog:
    """Opened at a step, with ``metrics.jsonl`` cut back to what it held then; ``timing.jsonl`` loses half a line."""

    def __init__(
        self,
        directory: Path,
        *,
        loggers: Sequence[Logger],
        run_name: str,
        config: Mapping[str, Any],
        first_step: int,
        first_row: int,
        extent: Extent,
    ) -> None:
        """``extent``: of ``metrics.jsonl`` at ``first_step``. Raises SettingsError if a logger cannot start."""
        self._loggers = Loggers(loggers)
        self._reference_names = any(getattr(logger, "reference_names", False) for logger in loggers)
        self._loggers.start(directory, run_name, config, first_step)
        try:
            self._metrics = JsonLines(directory / METRICS, extent)
            self._timing = JsonLines(directory / TIMING, _whole_lines(directory / TIMING))
        except BaseException:
            self._loggers.close()  # nobody else can: this log is never handed out
            raise
        self._started, self._first_row = time.monotonic(), first_row

    def write(self, step: int, rows: int, split: str, record: Mapping[str, Any]) -> None:
        """Write one line; ``record`` holds numbers, None, and histograms as ``firing_frequency.histogram`` makes them.

        Loggers get them by their ``tag``, and by the original code's names too where they ask for these.
        """
        self._metrics.write({"step": step, "rows": rows, "split": split, **record})
        named = {clean: value for name, value in record.items() if (clean := tag(split, name)) is not None}
        if self._reference_names:
            named |= {name: value for name, value in record.items() if "/" in name}
        numbers = {name: value for name, value in named.items() if _is_number(value)}
        if numbers:
            self._loggers.log(step, numbers)
        for name, value in named.items():
            if isinstance(value, dict):
                self._loggers.log_histogram(step, name, value["counts"], EDGES)

    def write_timing(self, step: int, rows: int, n_steps: int) -> None:
        """Note the time since the start, the rate since then, and how many steps there are to be."""
        seconds, rate = round(time.monotonic() - self._started, 3), round(self.rate(rows), 1)
        self._timing.write({"step": step, "seconds": seconds, "rows_per_second": rate, "n_steps": n_steps})

    def rate(self, rows: int) -> float:
        """Return the rows per second since the log was opened, after ``rows`` of them."""
        return (rows - self._first_row) / max(1e-9, time.monotonic() - self._started)

    def commit(self) -> Extent:
        """Make all lines survive a power cut; return what ``metrics.jsonl`` holds."""
        return self._metrics.commit()

    def close(self) -> None:
        """Close the loggers."""
        self._loggers.close()


def _whole_lines(path: Path) -> Extent:
    """Return what a log holds up to the end of its last line; a killed process may have written half of the next."""
    return Extent(read_log(path).rfind(b"\n") + 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
