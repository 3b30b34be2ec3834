"""``pipeline train`` killed at many random moments ends with the bytes of a run in one go."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.training.loop.settings import TrainSettings
from tests.pipeline.train.test_resume import CHECKPOINT_STEPS, SETTINGS, results
from tests.support.cache_jobs import Kill, count_renames, die_at, differing
from tests.support.forked import forked
from tests.support.training_caches import small_cache

N_KILLS = 3


def run_training(cache: Path, output: Path, kill: Kill | None = None) -> None:
    if kill is not None:
        die_at(kill)
    torch.set_num_threads(1)
    settings = TrainSettings.read(SETTINGS)
    train.run(settings, cache=cache, output=output, compute=Compute(quiet=True), checkpoint_steps=CHECKPOINT_STEPS)


def run_in_child(cache: Path, output: Path, kill: Kill | None = None, seconds: float | None = None) -> int:
    process = forked().Process(target=run_training, args=(cache, output, kill))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """Every file of a run in one go, and how many renames it took."""
    output = tmp_path_factory.mktemp("whole") / "transcoder"
    n_renames = count_renames(lambda: run_training(cache, output))
    return results(output), n_renames


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_training_killed_at_random_writes_and_moments_ends_with_the_same_bytes(
    cache: Path, uninterrupted: tuple[dict[str, bytes], int], tmp_path: Path, seed: int
) -> None:
    expected, n_renames = uninterrupted
    rng = np.random.Generator(np.random.Philox(seed))
    output = tmp_path / "transcoder"
    for _ in range(N_KILLS):
        kill = Kill(int(rng.integers(1, n_renames // 2)), after=bool(rng.integers(2)))
        assert run_in_child(cache, output, kill) in (-signal.SIGKILL, 0)
        assert run_in_child(cache, output, seconds=float(rng.uniform(0.1, 0.6))) in (-signal.SIGKILL, 0)
    assert run_in_child(cache, output) == 0
    assert differing(results(output), expected) == []
