"""``pipeline cache`` killed anywhere and run again ends with the bytes of a run that was not interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from tailrace.storage.artifact import MANIFEST
from tailrace.storage.cache_verify import verify_bytes
from tests.support.cache_jobs import Job, Kill, count_renames, differing, kill_until_done, run_cache, run_job, tree
from tests.support.quick import quick

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """Every file of a cache made in one go, and how many renames that took."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    n_renames = count_renames(lambda: run_cache(path))
    return tree(path), n_renames


KILLS = {
    "contexts": [Kill(1, "train/contexts/documents"), Kill(3, "train-contexts"), Kill(2, "packing.npz", after=True)],
    "unit edges": [
        Kill(1, "plan.json"),
        Kill(1, "train-unit-000000"),  # shards written, not vouched for
        Kill(1, "train-unit-000001", after=True),
        Kill(2, "sites/layer0/out"),
        Kill(1, "train-unit-000007"),  # the short last one
    ],
    "publishing": [
        Kill(1, "vocabulary.json"),
        Kill(1, "statistics", after=True),
        Kill(1, "manifest-0.json", after=True),
        Kill(2, MANIFEST.removesuffix(".json")),  # manifest-0.json comes first
    ],
    "the moment after publishing": [Kill(1, "/" + MANIFEST, after=True)],
}


@pytest.mark.parametrize("where", quick(KILLS, "publishing"))
def test_a_cache_killed_at_an_edge_ends_with_the_same_bytes(
    uninterrupted: tuple[dict[str, bytes], int], tmp_path: Path, where: str
) -> None:
    job = Job.cache(tmp_path / "cache")
    assert kill_until_done(job, KILLS[where]) == [KILLED] * len(KILLS[where]) + [0]
    assert differing(tree(tmp_path / "cache"), uninterrupted[0]) == []


def random_kills(n_renames: int, seed: int, n: int) -> list[Kill]:
    rng = np.random.Generator(np.random.Philox(seed))
    return [Kill(int(rng.integers(1, n_renames + 1)), after=bool(rng.integers(2))) for _ in range(n)]


@pytest.mark.parametrize("seed", quick([1, 2, 3], 2))
def test_a_cache_killed_at_a_random_write_ends_with_the_same_bytes(
    uninterrupted: tuple[dict[str, bytes], int], tmp_path: Path, seed: int
) -> None:
    expected, n_renames = uninterrupted
    kills = random_kills(n_renames, seed, 1)
    job = Job.cache(tmp_path / "cache")
    assert kill_until_done(job, kills) == [KILLED, 0]
    assert differing(tree(tmp_path / "cache"), expected) == []
    assert verify_bytes(tmp_path / "cache") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_cache_killed_after_a_random_time_ends_with_the_same_bytes(
    uninterrupted: tuple[dict[str, bytes], int], tmp_path: Path, seed: int
) -> None:
    rng = np.random.Generator(np.random.Philox(100 + seed))
    job = Job.cache(tmp_path / "cache")
    codes = [run_job(job, seconds=float(seconds)) for seconds in rng.uniform(0.3, 2.0, 3)]
    assert set(codes) <= {KILLED, 0}
    assert run_job(job) == 0
    assert differing(tree(tmp_path / "cache"), uninterrupted[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 34))
def test_a_cache_killed_at_three_random_writes_ends_with_the_same_bytes(
    uninterrupted: tuple[dict[str, bytes], int], tmp_path: Path, seed: int
) -> None:
    expected, n_renames = uninterrupted
    job = Job.cache(tmp_path / "cache")
    codes = kill_until_done(job, random_kills(n_renames, seed, 3))
    assert codes[0] == KILLED
    assert codes[-1] == 0
    assert differing(tree(tmp_path / "cache"), expected) == []
