"""A contender of train_step.py as a process that takes a step when told to.

Steps of all contenders interleave finely that way, each in its own environment, with nothing rebuilt in between. The
parent writes one JSON object a line to stdin and reads one a line from a pipe of its own, because libraries print to
stdout as they like. Needs only torch and NumPy, so that it runs in every peer's environment.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.planted_rows import Planted, Problem, load

LEARNING_RATE = 1e-6
"""Of every contender. Small enough that weights, and so L0, stay where they were planted; a step costs the same."""


class Stepper(Protocol):
    """One way to train, ready for its first batch."""

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take one optimiser step on (rows, width) activations; an autoencoder ignores ``outputs``."""
        ...

    def l0(self, inputs: torch.Tensor) -> float:
        """Return the mean number of features that fire on a row; not timed."""
        ...


@dataclass(frozen=True)
class Task:
    """What a contender is to build: an architecture and a mode of its side, on planted rows and weights."""

    architecture: str
    mode: str
    problem: Problem
    planted: Planted


def serve(build: Callable[[Task], Stepper], packages: Sequence[str]) -> None:
    """Build the contender that the command line names, then answer the parent until it closes the pipe."""
    arguments = json.loads(sys.argv[1])
    answers = os.fdopen(arguments["answer_pipe"], "w")
    _use_one_core()
    planted, problem = load(Path(arguments["folder"]))
    task = Task(arguments["architecture"], arguments["mode"], problem, planted)
    batches = itertools.cycle(zip(planted.inputs, planted.outputs, strict=True))
    first_inputs = planted.inputs[0]
    try:
        stepper = build(task)
        del planted, task  # the weights are the stepper's now
        _steps(stepper, batches, arguments["warm_up_steps"])
    except Exception as error:
        _answer(answers, {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
        raise
    versions = {name: importlib.metadata.version(name) for name in packages}
    _answer(answers, {"l0": stepper.l0(first_inputs), "versions": versions})
    for line in sys.stdin:
        cpu, wall = _steps(stepper, batches, json.loads(line)["steps"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _answer(answers, {"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": peak})


def _use_one_core() -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # a container may forbid it; one thread then has to do
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _steps(stepper: Stepper, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], n: int) -> tuple[float, float]:
    """Return processor and wall seconds of ``n`` steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for inputs, outputs in itertools.islice(batches, n):
        stepper.step(inputs, outputs)
    return time.process_time() - cpu, time.perf_counter() - wall


def _answer(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def mean_active(activations: torch.Tensor) -> float:
    """Return the mean number of positive entries of a row."""
    return float((activations > 0).sum(-1).double().mean())


def autocast(mode: str) -> contextlib.AbstractContextManager[Any]:
    """Return bfloat16 autocast if ``mode`` asks for it, else a context that changes nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if "bfloat16" in mode else contextlib.nullcontext()
