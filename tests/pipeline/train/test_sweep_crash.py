"""A sweep killed anywhere, or interrupted between two runs' checkpoints, ends with the bytes of one in one go."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline import cli
from tailrace.pipeline.shared import worker_processes
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.grid import expand
from tailrace.storage.errors import NonFiniteActivation, SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.checkpoint import Checkpoints, RunCheckpoint
from tailrace.training.loop.loggers import Logger
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.train_all import continued_together
from tests.pipeline.train.test_resume import results
from tests.support.cache_jobs import Kill, count_renames, die_at, differing
from tests.support.forked import forked
from tests.support.quick import quick
from tests.support.training_caches import small_cache

CHECKPOINT_STEPS = 4
BASE: dict[str, Any] = {
    "architecture": {"kind": "relu", "l1": 0.01},
    "d_sae": 40,
    "batch_rows": 64,
    "log_every": 3,
    "evaluate_every": 7,
    "snapshots": 1,
    "lr": 1e-2,
}
DIVERGING_D_SAE = 41
DIVERGING_STEP = 11


def runs() -> dict[str, TrainSettings]:
    """Three lengths, the shortest in the middle, and one run that diverges."""
    points = [{"steps": 23}, {"steps": 9}, {"steps": 23, "d_sae": DIVERGING_D_SAE}, {"steps": 17}]
    return expand(points, lambda point: TrainSettings.read(BASE, point))


def diverge(step: int, transcoder: Transcoder) -> None:
    if step == DIVERGING_STEP and transcoder.d_sae == DIVERGING_D_SAE:
        raise NonFiniteActivation("as a hook may find")


def run_sweep(cache: Path, output: Path, kill: Kill | None = None, checkpoint_steps: int = CHECKPOINT_STEPS) -> None:
    if kill is not None:
        die_at(kill)
    torch.set_num_threads(1)
    hooks = [(1, diverge)]
    sweep.run(
        runs(), cache=cache, output=output, compute=Compute(quiet=True), checkpoint_steps=checkpoint_steps, hooks=hooks
    )


def run_in_child(cache: Path, output: Path, kill: Kill | None = None, seconds: float | None = None) -> int:
    process = forked().Process(target=run_sweep, args=(cache, output, kill))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def outcome(path: Path) -> dict[str, bytes]:
    """Every file but the checkpoints kept of the run that diverged, of which two may lie at other steps."""
    return {name: data for name, data in results(path).items() if "/checkpoints/" not in name}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "sweep"
    # without a single checkpoint, so that nothing of the result comes from one
    run_sweep(cache, output, checkpoint_steps=10**9)
    return outcome(output)


def test_the_sweep_of_this_file_has_a_run_that_diverges(uninterrupted: dict[str, bytes]) -> None:
    marks = [name for name in uninterrupted if name.endswith("diverged.json")]
    assert marks == [f"runs/steps=23,d_sae={DIVERGING_D_SAE}/diverged.json"]
    assert json.loads(uninterrupted[marks[0]])["steps"] == DIVERGING_STEP > CHECKPOINT_STEPS
    assert len([name for name in uninterrupted if name.endswith("weights.safetensors")]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_killed_at_seeded_writes_ends_with_the_same_bytes(
    cache: Path, uninterrupted: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    output = tmp_path / "sweep"
    for _ in range(3):
        kill = Kill(int(rng.integers(1, 14)), after=bool(rng.integers(2)))
        assert run_in_child(cache, output, kill) == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
    assert run_in_child(cache, output) == 0
    assert differing(outcome(output), uninterrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_sweep_killed_at_random_writes_and_moments_ends_with_the_same_bytes(
    cache: Path, uninterrupted: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    n_renames = count_renames(lambda: run_sweep(cache, tmp_path / "counted"))
    rng = np.random.Generator(np.random.Philox(100 + seed))
    output = tmp_path / "sweep"
    for _ in range(4):
        kill = Kill(int(rng.integers(1, n_renames)), after=bool(rng.integers(2)))
        assert run_in_child(cache, output, kill) in (-signal.SIGKILL, 0)
        assert run_in_child(cache, output, seconds=float(rng.uniform(0.1, 0.6))) in (-signal.SIGKILL, 0)
    assert run_in_child(cache, output) == 0
    assert differing(outcome(output), uninterrupted) == []


def interrupt_save(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Raise KeyboardInterrupt in place of a checkpoint, given by its number counted from 1."""
    save, seen = Checkpoints.save, [0]

    def counted(self: Checkpoints, checkpoint: RunCheckpoint) -> None:
        seen[0] += 1
        if seen[0] == stop_at:
            raise KeyboardInterrupt
        save(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", counted)


@pytest.mark.parametrize("first", quick([1, 2, 3, 5, 6, 8], 2, 6))
def test_a_common_checkpoint_survives_two_interruptions_between_runs(
    cache: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    output = tmp_path / "sweep"
    for stop_at, checkpoint_steps in ((first, 4), (2, 3)):
        with monkeypatch.context() as patch:
            interrupt_save(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                run_sweep(cache, output, checkpoint_steps=checkpoint_steps)
        unfinished = [path for path in (output / "runs").iterdir() if not (path / "manifest.json").exists()]
        alive = [path for path in unfinished if not (path / "diverged.json").exists()]
        steps = [set(Checkpoints(path / "checkpoints").steps()) for path in alive]
        assert set.intersection(*steps) or first <= 3, "nothing to go on from"
    run_sweep(cache, output)
    assert differing(outcome(output), uninterrupted) == []


def test_runs_that_have_ended_are_not_trained_again(cache: Path, tmp_path: Path) -> None:
    output, widths = tmp_path / "sweep", set()

    def interrupt(step: int, transcoder: Transcoder) -> None:
        diverge(step, transcoder)
        widths.add(transcoder.d_sae)
        if step == 20:
            raise KeyboardInterrupt

    def run() -> None:
        sweep.run(
            runs(), cache=cache, output=output, compute=Compute(quiet=True), checkpoint_steps=4, hooks=[(1, interrupt)]
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    published = output / "runs" / "steps=9" / "weights.safetensors"
    written = published.stat().st_mtime_ns
    assert DIVERGING_D_SAE in widths
    widths.clear()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert published.stat().st_mtime_ns == written
    assert DIVERGING_D_SAE not in widths


def test_runs_go_on_together_from_a_common_step_or_with_those_as_far() -> None:
    assert continued_together({"a": [], "b": []}) == [["a", "b"]]
    assert continued_together({"a": [4, 8], "b": [8, 12], "c": [8]}) == [["a", "b", "c"]]
    assert continued_together({"a": [4, 8], "b": [12, 16], "c": [4, 8], "d": []}) == [["a", "c"], ["b"], ["d"]]


def go_on(cache: Path, output: Path, workers: int, *hooks: Any) -> None:
    compute = Compute(device="cpu", threads=1, workers=workers, quiet=True)
    hooked = [(1, hook) for hook in hooks]
    sweep.run(plain_runs(), cache=cache, output=output, compute=compute, checkpoint_steps=4, hooks=hooked)


def plain_runs() -> dict[str, TrainSettings]:
    return expand([{"steps": 23}, {"steps": 9}, {"steps": 17}], lambda point: TrainSettings.read(BASE, point))


@pytest.mark.slow
def test_workers_that_share_a_sweep_end_with_the_bytes_of_one_process(cache: Path, tmp_path: Path) -> None:
    go_on(cache, tmp_path / "alone", 0)
    go_on(cache, tmp_path / "shared", 2)
    expected = results(tmp_path / "alone")
    assert results(tmp_path / "shared") == expected

    def interrupt(step: int, transcoder: Transcoder) -> None:
        if step == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go_on(cache, tmp_path / "cut", 0, interrupt)
    ahead = tmp_path / "cut" / "runs" / "steps=17" / "checkpoints"
    for checkpoint in ahead.iterdir():  # as if another process had trained this run, and had not come as far
        checkpoint.unlink()
    go_on(cache, tmp_path / "cut", 2)
    assert results(tmp_path / "cut") == expected


class KillsItsWorker:
    """A logger that ends its process when the longest run comes past the end of the shortest."""

    name = "the one that kills"

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        """Remember whose numbers come."""
        self._is_longest = config["steps"] == 23

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """End the process, as the system does when memory runs out."""
        if self._is_longest and step > 9:
            signal.raise_signal(signal.SIGKILL)

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Take no histogram."""

    def close(self) -> None:
        """Have nothing to close."""


def killing_loggers() -> list[Logger]:
    return [KillsItsWorker()]


def test_a_lost_worker_costs_no_run_that_is_finished(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_processes, "ATTEMPTS", 1)  # each takes seconds to start
    output = tmp_path / "sweep"

    def lose_it() -> None:
        compute = Compute(device="cpu", threads=1, workers=1, quiet=True)
        sweep.run(plain_runs(), cache=cache, output=output, compute=compute, loggers=killing_loggers)

    monkeypatch.setattr(cli.cli, "main", lambda **_: lose_it())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sweep"])
    assert "what is finished is kept" in capsys.readouterr().err
    assert stopped.value.code == 1  # no setting is wrong
    assert (output / "runs" / "steps=9" / "manifest.json").exists()


def test_workers_are_for_sweeps_of_a_cache(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not with live rows or hooks"):
        go_on(cache, tmp_path / "out", 2, diverge)
    with pytest.raises(SettingsError, match="workers share the runs of a sweep"):
        train.run(TrainSettings.read(BASE), cache=cache, output=tmp_path / "out", compute=Compute(workers=2))
    assert not (tmp_path / "out").exists()
