"""Checkpoints are written often enough to lose little, and seldom enough to cost little, whatever a disk takes.

One that is not as it was written is never continued from.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import sweep
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.checkpoint import (
    CHECKPOINT_SECONDS,
    LARGEST_SHARE,
    CheckpointClock,
    Checkpoints,
    RunCheckpoint,
)
from tailrace.training.loop.settings import TrainSettings
from tests.pipeline.train.test_resume import results
from tests.support.cache_jobs import differing
from tests.support.training_caches import small_cache

NEVER = 10**9


class Seconds:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_cheap_checkpoints_are_due_once_a_minute() -> None:
    seconds = Seconds()
    clock = CheckpointClock(NEVER, now=seconds)
    due = []
    for step in range(1, 301):
        seconds.now += 1
        if clock.is_due(step):
            due.append(step)
            with clock.writing():
                seconds.now += 0.01
    assert due == [60, 120, 180, 240, 300]


def test_all_runs_of_a_step_get_the_answer_of_the_first() -> None:
    seconds = Seconds()
    clock = CheckpointClock(NEVER, now=seconds)
    answers = []
    for step, between in ((1, 59.0), (2, 30.0), (3, 1.0)):
        for _ in range(3):
            answers.append(clock.is_due(step))
            seconds.now += between
    # the first step begins before the minute is over and ends after it, the third begins within the next
    assert answers == [False] * 3 + [True] * 3 + [True] * 3


def test_the_next_round_waits_for_twenty_times_what_all_runs_took_for_the_last() -> None:
    seconds = Seconds()
    clock = CheckpointClock(NEVER, now=seconds)
    seconds.now = 100.0
    assert clock.is_due(1)
    for _ in range(3):  # 30 s of writing; the steps between do not count
        with clock.writing():
            seconds.now += 10
        seconds.now += 5
    for step, now, is_due in ((2, 699.0, False), (3, 700.0, True), (4, 759.0, False), (5, 760.0, True)):
        seconds.now = now
        # the round at 700 wrote nothing, so the one after it is due after a minute
        assert clock.is_due(step) is is_due


@pytest.mark.parametrize("n_runs", [1, 30])
@pytest.mark.parametrize("write_seconds", [0.01, 0.5, 4.0])
def test_writing_takes_no_more_than_its_share_of_a_long_training(n_runs: int, write_seconds: float) -> None:
    seconds = Seconds()
    clock = CheckpointClock(NEVER, now=seconds)
    written, rounds = 0.0, 0
    step = 0
    while seconds.now < 100_000:
        step += 1
        for run in range(n_runs):
            seconds.now += 0.12
            if clock.is_due(step):
                with clock.writing():
                    seconds.now += write_seconds
                written += write_seconds
                rounds += run == 0
    # the last round is paid for by the time after it
    assert written <= LARGEST_SHARE * seconds.now + n_runs * write_seconds
    # and no seldomer than that asks for: a round begins at the first step after its time
    longest = max(CHECKPOINT_SECONDS, n_runs * write_seconds / LARGEST_SHARE) + n_runs * 0.12
    assert rounds >= 100_000 // longest


def test_a_number_of_steps_is_kept_to_whatever_checkpoints_cost() -> None:
    seconds = Seconds()
    clock = CheckpointClock(10, now=seconds)
    due = []
    for step in range(1, 41):
        seconds.now += 1
        if clock.is_due(step):
            due.append(step)
            with clock.writing():
                seconds.now += 1000
    assert due == [10, 20, 30, 40]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


def train(cache: Path, output: Path, seconds: Seconds | None = None, stop_at: int | None = None) -> None:
    """Train three runs side by side, of which one ends at step 12; a step of a run takes 7 seconds."""
    base = {"architecture": {"kind": "relu", "l1": 0.01}, "d_sae": 40, "batch_rows": 64, "evaluate_every": 7}
    lengths = {"first": 40, "short": 12, "last": 40}
    runs = {name: TrainSettings.read(base, {"steps": n, "lr": 1e-3 * n}) for name, n in lengths.items()}

    def pass_time(step: int, transcoder: Transcoder) -> None:
        if seconds is not None:
            seconds.now += 7
        if step == stop_at:
            raise KeyboardInterrupt

    hooks = [(1, pass_time)]
    sweep.run(
        runs, cache=cache, output=output, compute=Compute(quiet=True, threads=1), checkpoint_steps=NEVER, hooks=hooks
    )


def test_runs_side_by_side_share_one_clock_and_end_with_the_same_bytes_whenever_it_strikes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cache, tmp_path / "undisturbed")
    seconds, saved = Seconds(), []
    save = Checkpoints.save

    def slow(self: Checkpoints, checkpoint: RunCheckpoint) -> None:
        seconds.now += 5
        saved.append(checkpoint.step)
        save(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(
        "tailrace.training.loop.train_all.CheckpointClock", lambda steps: CheckpointClock(steps, now=seconds)
    )
    with pytest.raises(KeyboardInterrupt):
        train(cache, tmp_path / "sweep", seconds, stop_at=30)
    # The minute is over in step 4, at 70 s. Three checkpoints took 15 s, so the next are due at 370 s, in step 20.
    # Those two took 10 s, so the next would be due 200 s later, which is after step 30.
    assert saved == [4, 4, 4, 20, 20]
    saved.clear()
    train(cache, tmp_path / "sweep", seconds)
    assert saved == [25, 25, 39, 39]
    assert differing(results(tmp_path / "sweep"), results(tmp_path / "undisturbed")) == []


def test_every_changed_byte_of_a_checkpoint_is_noticed_before_a_run_goes_on(tmp_path: Path) -> None:
    tensors = {"W": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "fired": torch.tensor([True, False])}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(RunCheckpoint(7, tensors, {"rows": 70}))
    loaded = checkpoints.load(7)
    assert (loaded.state, {name: value.tolist() for name, value in loaded.tensors.items()}) == (
        {"rows": 70},
        {name: value.tolist() for name, value in tensors.items()},
    )
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(ArtifactCorrupt, match=r"000000007.safetensors: is no readable checkpoint \(.+delete it"):
            checkpoints.load(7)


def test_checkpoints_that_a_user_moved_by_a_link_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "thesis").touch()
    (tmp_path / "checkpoints").symlink_to("big")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(RunCheckpoint(1, {"W": torch.ones(1)}, {}))
    assert checkpoints.steps() == [1]
    checkpoints.clear()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["big", "checkpoints", "thesis"]


def test_what_lies_behind_a_link_among_checkpoints_is_not_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(RunCheckpoint(1, {"W": torch.ones(1)}, {}))
    others = tmp_path / "others/000000009.safetensors"
    others.parent.mkdir()
    others.touch()
    (tmp_path / "checkpoints/link").symlink_to(others.parent)
    checkpoints.discard_after(0)
    assert checkpoints.steps() == []
    assert others.exists()
