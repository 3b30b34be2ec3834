"""What stands in the way of growing a cache is answered with the command that clears it, and that command does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tailrace.pipeline.cache import stage
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMismatch, TextError
from tests.support.cache_jobs import HERE, Job, Kill, command, copy_cache, run_cache, run_job, small_blocks
from tests.support.quick import quick


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "cache"
    run_cache(path, holdout="0")
    return path


def advised(refusal: str) -> list[str]:
    """Return the arguments of the command that a message gives in backquotes after `finish`."""
    found = re.search(r"finish .*?`pipeline (.*?)`", refusal)
    assert found is not None, refusal
    return shlex.split(found[1])


def test_an_extension_beyond_the_text_is_finished_as_advised(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_cache(small, tmp_path / "cache")
    with small_blocks(), pytest.raises(TextError, match="ends after"):
        stage.extend(path, 1_000_000, **HERE)
    with small_blocks(), pytest.raises(ArtifactMismatch) as refused:
        stage.widen(path, "1", (), **HERE)
    assert "an unfinished `extend` lies here" in str(refused.value)
    assert advised(str(refused.value)) == ["extend", str(path), "--tokens", "N"]
    assert command(capsys, "extend", path, "--tokens", "all", "--threads", 1, "--quiet").code == 0
    assert open_cache(path).split("train").n_rows == 1275
    assert command(capsys, "widen", path, "--layers", 1, "--threads", 1, "--quiet").code == 0
    assert verify_bytes(path) == []


def extend_instead(path: Path) -> None:
    stage.extend(path, 900, **HERE)


def widen_otherwise(path: Path) -> None:
    stage.widen(path, None, ["blocks.0.hook_resid_pre"], **HERE)


@pytest.mark.parametrize("other", quick([extend_instead, widen_otherwise], widen_otherwise))
def test_an_interrupted_widening_is_finished_as_advised(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Callable[[Path], None]
) -> None:
    path = copy_cache(small, tmp_path / "cache")
    assert run_job(Job("widen", path, layers="1"), Kill(2, "train-unit")) != 0
    with small_blocks(), pytest.raises(ArtifactMismatch) as refused:
        other(path)
    arguments = advised(str(refused.value))
    assert arguments == ["widen", str(path), "--hooks", "layer1=blocks.1.mlp.hook_in:blocks.1.mlp.hook_out"]
    assert command(capsys, *arguments, "--threads", 1, "--quiet").code == 0
    assert list(open_cache(path).sites) == ["layer0", "layer1"]
    assert verify_bytes(path) == []
