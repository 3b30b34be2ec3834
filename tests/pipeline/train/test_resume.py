"""A run that is interrupted anywhere and started again ends with the same bytes as one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import run
from tailrace.storage.artifact import MANIFEST
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import CHECKPOINTS
from tailrace.training.loop.checkpoint import Checkpoints, RunCheckpoint
from tailrace.training.loop.settings import TrainSettings
from tests.support.paths import ROOT
from tests.support.quick import quick
from tests.support.training_caches import small_cache

N_STEPS = 40
CHECKPOINT_STEPS = 6
SETTINGS = {
    "architecture": {"kind": "topk", "k": 3},
    "d_sae": 100,
    "steps": N_STEPS,  # 10 steps to an epoch
    "batch_rows": 64,
    "lr": 1e-2,
    "log_every": 3,
    "evaluate_every": 7,
    "evaluation_rows": 50,
    "snapshots": 3,
}

CHILD = f"""
import os, signal, sys
from pathlib import Path
import tailrace.training.architectures.transcoder
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import run
from tailrace.training.loop.settings import TrainSettings
from tests.support.quick import quick

cache, output, kill_step, kill_checkpoint = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def kill(step, transcoder):
    if step == kill_step:
        os.kill(os.getpid(), signal.SIGKILL)

save_file = tailrace.training.architectures.transcoder.save_file

def save_half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if f"{{kill_checkpoint:09d}}" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

tailrace.training.architectures.transcoder.save_file = save_half
settings = TrainSettings.read({SETTINGS!r})
quiet = Compute(quiet=True)
run(settings, cache=cache, output=output, compute=quiet, checkpoint_steps={CHECKPOINT_STEPS}, hooks=[(1, kill)])
strangers = {{"transformers", "transformer_lens", "datasets"}} & sys.modules.keys()
assert not strangers, f"training imported {{strangers}}"
"""


def results(path: Path) -> dict[str, bytes]:
    """Return every file of the artifact but the one that holds times."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in (".lock", "timing.jsonl")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "transcoder"
    # without a single checkpoint, so that nothing of the result comes from one
    run(TrainSettings.read(SETTINGS), cache=cache, output=output, compute=Compute(quiet=True), checkpoint_steps=10**9)
    return results(output)


def run_child(cache: Path, output: Path, kill_step: int, kill_checkpoint: int) -> int:
    arguments = [sys.executable, "-W", "error", "-c", CHILD, cache, output, kill_step, kill_checkpoint]
    finished = subprocess.run([*map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
    return finished.returncode


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_bytes(
    cache: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "transcoder"
    rng = np.random.Generator(np.random.Philox(11))
    first, last = sorted(rng.choice(np.arange(1, N_STEPS), 2, replace=False).tolist())
    halfway = CHECKPOINT_STEPS * ((first // CHECKPOINT_STEPS + last // CHECKPOINT_STEPS) // 2 + 1)
    for kill_step, kill_checkpoint in ((first, 0), (0, halfway), (max(last, halfway + 1), 0)):
        assert run_child(cache, output, kill_step, kill_checkpoint) == -signal.SIGKILL
        assert not (output / MANIFEST).exists()
    assert run_child(cache, output, 0, 0) == 0
    assert results(output) == uninterrupted


@pytest.mark.parametrize("step", quick([1, 6, 7, 20, 39, 40], 7, 40))
def test_a_run_interrupted_in_process_ends_with_the_same_bytes(
    cache: Path, uninterrupted: dict[str, bytes], tmp_path: Path, step: int
) -> None:
    output = tmp_path / "transcoder"

    def interrupt(at: int, transcoder: Transcoder) -> None:
        if at == step:
            raise KeyboardInterrupt

    settings = TrainSettings.read(SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(
            settings,
            cache=cache,
            output=output,
            compute=Compute(quiet=True),
            checkpoint_steps=CHECKPOINT_STEPS,
            hooks=[(1, interrupt)],
        )
    run(settings, cache=cache, output=output, compute=Compute(quiet=True), checkpoint_steps=CHECKPOINT_STEPS)
    assert results(output) == uninterrupted


def test_a_checkpoint_returns_what_was_saved_and_only_the_newest_two_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        checkpoints.save(RunCheckpoint(step, {"weights": torch.full((2,), float(step))}, {"rows": step * 100}))
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.tensors["weights"].tolist(), latest.state) == (15, [15.0, 15.0], {"rows": 1500})
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == [
        "000000010.safetensors",
        "000000015.safetensors",
    ]


def test_a_damaged_checkpoint_is_named_and_not_skipped(cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "transcoder"

    def interrupt(at: int, transcoder: Transcoder) -> None:
        if at == 20:
            raise KeyboardInterrupt

    settings = TrainSettings.read(SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(
            settings,
            cache=cache,
            output=output,
            compute=Compute(quiet=True),
            checkpoint_steps=6,
            hooks=[(1, interrupt)],
        )
    damaged = output / CHECKPOINTS / "000000018.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ArtifactCorrupt, match=r"000000018.safetensors.*delete it to continue"):
        run(settings, cache=cache, output=output, compute=Compute(quiet=True))
