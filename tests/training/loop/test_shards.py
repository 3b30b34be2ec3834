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

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import TopK
from tailrace.training.loop import initialise as initial
from tailrace.training.loop.checkpoint import Checkpoints, RunCheckpoint
from tailrace.training.loop.initialise import FeatureSlice, data_directions, initialise, random_directions
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import refuse_shards
from tests.support.paths import ROOT
from tests.support.planted_runs import SITE
from tests.support.sharded_runs import (
    CHECKPOINT,
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

QUIET = Compute(quiet=True)

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


def test_a_checkpoint_counts_only_if_every_process_has_written_its_part(tmp_path: Path) -> None:
    architecture, folder = RUNS["jumprelu"], tmp_path / "checkpoints"
    in_threads(2, partial(train_planted, architecture, folder=folder))
    of_one = Checkpoints(folder)
    assert of_one.steps() == [CHECKPOINT]
    run, _ = train_planted(architecture, None, tmp_path / "alone")
    together = of_one.load(CHECKPOINT).tensors  # one process goes on from what two have written
    assert {name: value.shape for name, value in together.items()} == {
        name: value.shape for name, value in run.items() if name in together
    }
    (part,) = (folder / "part-1").iterdir()
    part.unlink()
    assert of_one.steps() == []


def test_a_checkpoint_of_all_features_is_refused_by_processes_that_share_them(tmp_path: Path) -> None:
    train_planted(RUNS["jumprelu"], None, tmp_path)
    with pytest.raises(SettingsError, match="had all features; continue without --shard-features"):
        Checkpoints(tmp_path, 0, 2).load(CHECKPOINT)


def test_only_the_newest_checkpoints_are_kept_and_with_them_their_parts(tmp_path: Path) -> None:
    shards = {"n": 2, "blocks": {"W": 1}}
    first, second = (Checkpoints(tmp_path, rank, 2) for rank in range(2))
    for step in (1, 2, 3):
        for files in (second, first):
            files.save(RunCheckpoint(step, {"W": torch.ones(1, 1)}, {"run": {"shards": shards}}))
    assert first.steps() == [2, 3]
    assert [path.stem for path in sorted((tmp_path / "part-1").iterdir())] == ["000000002", "000000003"]
    first.discard_after(2)
    assert [path.stem for path in (tmp_path / "part-1").iterdir()] == ["000000002"]


@pytest.mark.parametrize("own", [FeatureSlice(0, 7, 20), FeatureSlice(7, 7, 20), FeatureSlice(14, 6, 20)])
def test_features_begin_as_they_would_among_all(own: FeatureSlice, monkeypatch: pytest.MonkeyPatch) -> None:
    every, rows = FeatureSlice(0, 20, 20), slice(own.first, own.first + own.n)
    outputs = torch.randn(15, 3, generator=torch.Generator().manual_seed(0))  # too few for all features
    outputs[8] = 0
    directions = random_directions(1, "a", every, 3)
    of_data = data_directions(outputs, torch.zeros(3), every, 1)
    whole, part = (TopK(k=2).build(3, 4, n) for n in (20, own.n))
    initialise(whole, mean_in=torch.zeros(3), mean_out=torch.zeros(4), encoder_init="kaiming")
    monkeypatch.setattr(initial, "_DRAWN", 12)  # four rows at a time
    assert torch.equal(random_directions(1, "a", own, 3), directions[rows])
    assert torch.equal(data_directions(outputs, torch.zeros(3), own, 1), of_data[rows])
    initialise(part, mean_in=torch.zeros(3), mean_out=torch.zeros(4), encoder_init="kaiming", own=own)
    assert torch.equal(part.W_enc, whole.W_enc[rows])
    assert torch.equal(part.W_dec, whole.W_dec[rows])


def test_everything_that_cannot_be_shared_out_is_named_at_once() -> None:
    settings = TrainSettings.read(
        {
            "architecture": {"kind": "relu", "tied_bias": True},
            "d_sae": 30,
            "auxiliary": {"kind": "ghost"},
            "resampling": {"kind": "l2"},
            "optimiser": "muon",
            "kernel": "compiled",
        }
    )
    with pytest.raises(SettingsError) as caught:
        refuse_shards(settings, [SITE], 4, starts=True)
    for words in (
        *(
            "d_sae: 4 processes cannot have equal shares of 30 features; 28 or 32 can",
            "auxiliary: ghost",
            "resampling:",
        ),
        *("optimiser: muon", "kernel: compiled", "architecture.tied_bias", "--from"),
    ):
        assert words in str(caught.value)
    refuse_shards(TrainSettings.read({"d_sae": 32}), [SITE], 4)


def test_features_are_not_shared_out_without_other_processes(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="this is the only one; use torchrun"):
        train.run(TrainSettings(), cache=tmp_path, output=tmp_path / "out", compute=QUIET, shard_features=True)
    assert not (tmp_path / "out").exists()


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
