"""Claim: caching, training and reading take at most 1.02 times as long as in an earlier revision, which git keeps.

Two processes do the same work, one with the code of either revision, and take turns of a fifth of a second: one stops
while the other runs. What else the machine does then falls on both alike, which whole runs one after the other do not
give: pairs of the same work scatter by tens of per cent on a shared machine.
"""

from __future__ import annotations

import io
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.made_up_rows import cache_format, write_cache
from benchmarks.report import Report, parse_arguments, scratch_folder
from benchmarks.step_processes import ONE_THREAD
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.speeches import fetch_sotu

TASKS = ("cache", "train", "read")
TURN_SECONDS = 0.2
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Size:
    """How much each task has to do: tokens cached, rows trained on, epochs of the cache read."""

    tokens: int
    train_rows: int
    epochs: int
    cache_rows: int
    pairs: int
    """Of rounds: in one the earlier revision begins, in the other this checkout does."""


FULL = Size(tokens=60_000, train_rows=60_000, epochs=3, cache_rows=600_000, pairs=6)
QUICK = Size(tokens=2_000, train_rows=4_000, epochs=1, cache_rows=20_000, pairs=1)


def main() -> None:
    arguments = parse_arguments(__doc__ or "", revision="what to compare this checkout with: a commit, a tag, a branch")
    size = QUICK if arguments.quick else FULL
    report = Report(
        "before_after",
        f"Caching, training and reading beside {arguments.revision}",
        f"Two processes on one core in turns of {TURN_SECONDS} s. {size.pairs} pairs of rounds: in one round of a pair "
        "the one side begins, in the other the other, because who comes second finds pages and caches warm; a pair's "
        "ratio is their geometric mean. Given is the median; of six pairs, the range holds the true one with 96.9 %. "
        f"Caching: {size.tokens:,} rows of the tiny model. Training: {size.train_rows:,} rows of 768 + 768, 4,096 "
        f"features, batches of 1,024. Reading: {size.epochs} epochs of {size.cache_rows:,} such rows. Both sides read "
        "files written by this checkout. Imports and a run of a tenth of the size come first, unmeasured. Wall: the "
        "turns of a process, summed. Processor: user and system time of all its threads. Ratios: time now over time "
        "before. Opens, syncs and bytes that were checksummed are counted in runs of their own.",
        ("task", "measure", arguments.revision, "now", "now over before", "range"),
        ("numpy", "torch", "zarr"),
        targets={f"{task}_processor": "≤ 1.02" for task in TASKS},
    )
    with scratch_folder(arguments) as folder:
        trees = {"before": checkout(arguments.revision, folder / "before"), "now": _ROOT}
        write_cache(folder / "rows", cache_format(shard_rows=8192), size.cache_rows)
        text = str(fetch_sotu(folder / "speeches.jsonl"))
        for task in TASKS:
            told = {
                "task": task,
                "model": str(bundled_model("tiny-lm")),
                "text": text,
                "cache": str(folder / "rows"),
                "tokens": size.tokens,
                "train_rows": size.train_rows,
                "epochs": size.epochs,
            }
            found = {name: Seconds() for name in trees}
            for first, second in [("before", "now"), ("now", "before")] * size.pairs:
                for name, taken in take_turns({name: (trees[name], told) for name in (first, second)}).items():
                    found[name].add(taken)
            add(report, task, **found)
            add_counts(report, task, trees, told)
    report.finish(arguments)


@dataclass
class Seconds:
    """What one side took in every round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, taken: dict[str, float]) -> None:
        """Add one round."""
        self.wall.append(taken["wall"])
        self.processor.append(taken["processor"])


def add(report: Report, task: str, before: Seconds, now: Seconds) -> None:
    """Add the times of one task."""
    for measure in ("wall", "processor"):
        earlier, later = getattr(before, measure), getattr(now, measure)
        ratios = paired_ratios(earlier, later)
        ratio, spread = statistics.median(ratios), f"{min(ratios):.3f}–{max(ratios):.3f}"
        medians = (f"{statistics.median(seconds):.2f} s" for seconds in (earlier, later))
        report.rows.append((task, measure, *medians, f"{ratio:.3f}", spread))
        report.ratios[f"{task}_{measure}"] = ratio


def paired_ratios(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """Return now over before for every two rounds, of which one side began the first and the other the second."""
    ratios = [later / earlier for earlier, later in zip(before, now, strict=True)]
    return [math.sqrt(one * other) for one, other in zip(ratios[::2], ratios[1::2], strict=True)]


def add_counts(report: Report, task: str, trees: dict[str, Path], told: dict[str, Any]) -> None:
    """Add what each revision asks of the disk and of the checksum for one task."""
    counts = {}
    for name, tree in trees.items():
        with worker(tree, {**told, "count": True}) as process:
            run_in_turns([process])
            counts[name] = process.found
    for what in ("opens", "syncs", "checksummed_bytes"):
        before, now = counts["before"][what], counts["now"][what]
        ratio = f"{now / before:.3f}" if now <= 10 * before and before else "–"
        report.rows.append((task, what.replace("_", " "), f"{before:,}", f"{now:,}", ratio, ""))


def checkout(revision: str, folder: Path) -> Path:
    """Unpack a revision of this repository into a new folder; return it."""
    asked = ["git", "-C", str(_ROOT), "archive", revision]
    packed = subprocess.run(asked, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@dataclass
class Worker:
    """A process of before_after_task.py, ready and waiting for its first turn."""

    process: subprocess.Popen[str]
    wall: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Let it do what comes next, the small run or the whole one, from its next turn on."""
        assert self.process.stdin is not None
        self.wall, self.found = 0.0, {}
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def turn(self, seconds: float) -> None:
        """Let it run for so long, or to its end; then ``found`` is what it measured, once it is done."""
        start = time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        if select.select([self._answers()], [], [], seconds)[0]:
            self.found = self._answer()
        elif self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args!r}: ended before it was done")
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.wall += time.perf_counter() - start

    def wait_until_ready(self) -> None:
        """Wait for the end of imports."""
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers().readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r}: ended before it was done")
        return dict(json.loads(line))

    def _answers(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout


@contextmanager
def worker(tree: Path, told: dict[str, Any]) -> Iterator[Worker]:
    """Yield a process that works with the code in ``tree``; what it wrote is deleted at the end."""
    variables = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    script = Path(__file__).parent / "before_after_task.py"
    with tempfile.TemporaryDirectory(dir=Path(told["cache"]).parent) as output:
        command = [sys.executable, str(script), json.dumps({**told, "tree": str(tree), "output": output})]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            process_group=0,  # so that a turn stops what it started, too
        )
        try:
            ready = Worker(process)
            ready.wait_until_ready()
            os.killpg(process.pid, signal.SIGSTOP)
            yield ready
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def take_turns(contenders: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return wall and processor seconds of each, all of them at work in turn from beginning to end."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(*contender)) for name, contender in contenders.items()}
        run_in_turns(list(workers.values()))
        return {
            name: {"wall": each.wall, "processor": each.found["processor_seconds"]} for name, each in workers.items()
        }


def run_in_turns(workers: Sequence[Worker]) -> None:
    """Have all do the small run, then the whole one, which is measured.

    The small run is done in turns, too: of a process that has stood still for seconds the kernel may have put pages
    away, and getting them back took the process that was started first a tenth of its time.
    """
    for _ in ("small", "whole"):
        for each in workers:
            each.start()
        while unfinished := [each for each in workers if not each.found]:
            for each in unfinished:
                each.turn(TURN_SECONDS)


if __name__ == "__main__":
    main()
