"""Processes that share the features of a transcoder take the steps of one process that has them all."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.paths import ROOT
from tests.support.sharded_runs import (
    QUICK_STEPS,
    RUNS,
    STEPS,
    StepCase,
    in_threads,
    joined,
    step_blocks,
    take_steps,
    train_planted,
)
from tests.training.loop.test_distributed import difference

SLOW_STEPS = [pytest.param(case, marks=() if case in QUICK_STEPS else pytest.mark.slow) for case in STEPS]
TOLERANCE = 1e-12
"""Sums over features are taken in another order."""
OF_A_RUN = 1e-9
"""Eight steps of Adam on that rounding."""


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    worst = {name: difference(found[name], value) for name, value in wanted.items()}
    assert {name: value for name, value in worst.items() if value > tolerance} == {}


@pytest.mark.parametrize("case", SLOW_STEPS, ids=lambda case: "-".join(map(str, case)))
def test_a_step_of_two_slices_is_the_step_of_all_features(case: StepCase) -> None:
    pieces = in_threads(2, lambda group: take_steps(case, group))
    check_same(joined(pieces, step_blocks(case)), take_steps(case, None), TOLERANCE)


@pytest.mark.parametrize(
    "kind", ["topk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in RUNS if kind != "topk")]
)
def test_a_run_is_that_of_one_process_and_goes_on_with_any_number(kind: str, tmp_path: Path) -> None:
    architecture = RUNS[kind]
    wanted, _ = train_planted(architecture, None, tmp_path / "alone")
    found = in_threads(4, lambda group: train_planted(architecture, group, tmp_path / "checkpoints"))
    pieces, blocks = [state for state, _ in found], found[0][1]
    check_same(joined(pieces, blocks), wanted, OF_A_RUN)
    for size in (4, 2):
        again = in_threads(
            size, lambda group: train_planted(architecture, group, tmp_path / "checkpoints", resume=True)
        )
        resumed = joined([state for state, _ in again], blocks)
        check_same(resumed, wanted, OF_A_RUN)
        if size == 4:
            assert all(torch.equal(value, joined(pieces, blocks)[name]) for name, value in resumed.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_real_processes_do_the_same(size: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.support.sharded_runs", str(tmp_path)]
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]
    try:
        messages = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()  # one that waits for a process that failed
    assert [process.returncode for process in started] == [0] * size, "\n".join(messages)
    for index, case in enumerate(STEPS):
        pieces = [load_file(tmp_path / f"step-{index}" / f"{rank}") for rank in range(size)]
        check_same(joined(pieces, step_blocks(case)), take_steps(case, None), TOLERANCE)
    for kind, architecture in RUNS.items():
        wanted, _ = train_planted(architecture, None, tmp_path / "alone" / kind)
        _, blocks = in_threads(2, partial(train_planted, architecture, folder=tmp_path / "threads" / kind))[0]
        pieces = [load_file(tmp_path / f"run-{kind}" / f"{rank}") for rank in range(size)]
        check_same(joined(pieces, blocks), wanted, OF_A_RUN)
