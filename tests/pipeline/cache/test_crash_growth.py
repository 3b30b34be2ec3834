"""``pipeline extend``, ``widen`` and ``shuffle``, killed anywhere and run again, end with the bytes of one go."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.storage.cache_verify import verify_bytes
from tests.support.cache_jobs import Job, Kill, copy_cache, count_renames, differing, kill_until_done, run_cache, tree
from tests.support.quick import quick

KILLED = -signal.SIGKILL
STAGES: dict[str, dict[str, Any]] = {"extend": {"tokens": 900}, "widen": {"layers": "1"}, "shuffle": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "cache"
    run_cache(path)
    return path


@pytest.fixture(scope="module", params=quick(STAGES, "extend", "shuffle"))
def stage(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes], int]:
    """A stage, every file after it ran in one go, and how many renames that took."""
    path = copy_cache(base, tmp_path_factory.mktemp(request.param) / "cache")
    n_renames = count_renames(Job(request.param, path, **STAGES[request.param]).run)
    return request.param, tree(path), n_renames


def check(stage: tuple[str, dict[str, bytes], int], base: Path, path: Path, kills: list[Kill]) -> None:
    name, expected, _ = stage
    copy_cache(base, path)
    codes = kill_until_done(Job(name, path, **STAGES[name]), kills)
    assert codes[0] == KILLED
    assert codes[-1] == 0
    assert differing(tree(path), expected) == []
    assert verify_bytes(path) == []


def test_a_stage_killed_half_way_and_at_its_end_ends_with_the_same_bytes(
    stage: tuple[str, dict[str, bytes], int], base: Path, tmp_path: Path
) -> None:
    kills = [Kill(stage[2] // 2), Kill(1, "/manifest", after=True)]
    check(stage, base, tmp_path / "cache", kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_stage_killed_at_random_writes_ends_with_the_same_bytes(
    stage: tuple[str, dict[str, bytes], int], base: Path, tmp_path: Path, seed: int
) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    kills = [Kill(int(rng.integers(1, stage[2] + 1)), after=bool(rng.integers(2))) for _ in range(2)]
    check(stage, base, tmp_path / "cache", kills)
