"""Random inputs for every reader of what a user or a stranger hands over.

A reader answers or raises an error that says what to do; anything else, a hang or a jump of memory is a failure. Inputs
depend on the seed and their number alone, so that each can be repeated: ``python -m tests.faults.fuzz --help``.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click

from tailrace.storage.errors import ActionableError
from tests.faults.inputs import Inputs
from tests.faults.readers import RARE, READERS
from tests.support.paths import ROOT

SECONDS = 20.0
"""Of the processor that a reader may take: the first to load transformers takes half of it, most a thousandth."""
HANGS_SECONDS = 120.0
"""By the clock, after which a reader that waits for something is ended. Other programs may keep the machine busy."""
GROWTH_BYTES = 1 << 30
"""By which an input of some kilobytes may raise the peak of the process's memory."""


class Outcome(NamedTuple):
    """What became of an input."""

    is_answer: bool
    problem: str | None = None
    """What went wrong, and where; None for an answer or an error that says what to do."""


@dataclass
class Counts:
    """How many inputs were read, and what became of them."""

    of: str
    """What they were read by."""
    answered: int = 0
    refused: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Names of inputs by what went wrong."""

    def add(self, outcome: Outcome, name: str) -> None:
        """Count the outcome of an input of that name."""
        if outcome.problem is not None:
            self.failures.setdefault(outcome.problem, []).append(name)
        else:
            self.answered += outcome.is_answer
            self.refused += not outcome.is_answer

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(map(len, self.failures.values()))

    @property
    def inputs(self) -> int:
        """How many there were."""
        return self.answered + self.refused + self.failed

    def __str__(self) -> str:
        numbers = f"{self.answered:,} answered, {self.refused:,} refused, {self.failed:,} failed"
        bad = [f"{what} ({len(names)} times, first {names[0]})" for what, names in self.failures.items()]
        return "\n".join([f"{self.inputs:,} inputs of {self.of}: {numbers}", *sorted(bad)])


class _Slow(BaseException):
    """A reader is not done in time. No Exception, so that no reader takes it for one of its own."""


def run(seed: int, seconds: float, *, inputs: int | None = None, only: Sequence[str] = (), first: int = 0) -> Counts:
    """Read random inputs until ``seconds`` are over or so many ``inputs`` are read; return what became of them."""
    names = list(only or READERS)
    counts, end = Counts(f"{len(names)} readers"), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        drawn = Inputs(Path(folder))
        for number in itertools.count(first):
            if time.monotonic() > end or counts.inputs == inputs:
                break
            name = names[number % len(names)]
            if number // len(names) % RARE[name] and not only:
                continue
            drawn.random.seed(f"{seed}/{name}/{number}")
            counts.add(judge(partial(READERS[name], drawn)), f"{name} {number}")
    return counts


def judge(read: Callable[[], object]) -> Outcome:
    """Call what reads an input, within limits of time and memory, and return what comes of it."""
    before, began = peak_bytes(), time.process_time()
    kept = signal.signal(signal.SIGALRM, _raise_slow)
    signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
    problem, is_answer = None, False
    try:
        read()
        is_answer = True
    except (ActionableError, click.ClickException, click.exceptions.Exit, click.Abort):
        pass
    except SystemExit as error:
        problem = None if error.code in (0, 1, 2) else f"exit {error.code}"
    except _Slow as error:
        problem = f"hangs at {_innermost(error)}"
    except Exception as error:
        problem = f"{type(error).__name__} at {_innermost(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    if problem is None and time.process_time() - began > SECONDS:
        problem = f"takes more than {SECONDS:.0f} s of the processor"
    if problem is None and peak_bytes() - before > GROWTH_BYTES:
        problem = f"takes more than {GROWTH_BYTES >> 20} MiB"
    return Outcome(is_answer, problem)


def peak_bytes() -> int:
    """Return the most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _raise_slow(*_: object) -> None:
    raise _Slow


def _innermost(error: BaseException) -> str:
    """Return the innermost line of ours in a traceback."""
    folders = tuple(str(ROOT / name) for name in ("storage", "training", "analysis", "pipeline", "tailrace"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folders)]
    if not frames:
        return "a line of the tests"
    return f"{os.path.relpath(frames[-1].filename, ROOT)}:{frames[-1].lineno}"


@click.command()
@click.option("--seed", default=0)
@click.option("--seconds", default=60.0)
@click.option("--inputs", type=int, default=None)
@click.option("--only", multiple=True, type=click.Choice(list(READERS)), help="Reader; may be repeated.")
@click.option("--first", default=0, help="Number of the first input.")
def main(seed: int, seconds: float, inputs: int | None, only: tuple[str, ...], first: int) -> None:
    """Read random inputs and show what became of them."""
    counts = run(seed, seconds, inputs=inputs, only=only, first=first)
    click.echo(counts)
    sys.exit(bool(counts.failures))


if __name__ == "__main__":
    main()
