"""`pipeline train` started by torchrun: two processes train the transcoder that one would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tailrace.pipeline.train import sweep
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.manifest import read_either_manifest
from tailrace.training.loop.settings import TrainSettings
from tests.support.training_caches import publish_layers, small_cache

PIPELINE = Path(sys.executable).parent / "pipeline"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(
    cache: Path, output: Path, *launcher: str, across: bool = False, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    settings = [
        "--architecture",
        "batch_topk",
        "--k",
        "2",
        "--d-sae",
        "24",
        "--batch-rows",
        "65",
        "--steps",
        "12",
        *(["--cross-layer"] if across else []),
        *flags,
    ]
    command = [*launcher, str(PIPELINE), "train", str(cache), *settings, "--precision", "float32", "--out", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard-features",)], ids=["rows", "features"])
@pytest.mark.parametrize("across", [False, True], ids=["one layer", "cross-layer"])
def test_two_processes_publish_what_one_does(across: bool, flags: tuple[str, ...], tmp_path: Path) -> None:
    cache = publish_layers(tmp_path / "cache") if across else small_cache(tmp_path / "cache")
    alone, together = (tmp_path / name for name in ("alone", "together"))
    assert train(cache, alone, sys.executable, across=across).returncode == 0
    done = train(cache, together, *TORCHRUN, across=across, flags=flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out FVU") == 1  # one of them speaks
    wanted, found = (load_file(path / "weights.safetensors") for path in (alone, together))
    for name, values in wanted.items():
        # gradients are sums in another order: rounding, grown over twelve steps of Adam
        assert torch.allclose(found[name], values, atol=1e-4 * float(values.abs().max())), name
    scores = [read_either_manifest(path).metrics.heldout["fvu"] for path in (alone, together)]
    assert abs(scores[0] - scores[1]) < 1e-4
    again = train(cache, together, *TORCHRUN, across=across, flags=flags)
    assert again.returncode == 0  # published: returned as it is


def test_a_sweep_by_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    runs = {f"k={k}": TrainSettings.read({"architecture": {"kind": "topk", "k": k}}) for k in (1, 2)}
    with pytest.raises(SettingsError, match="a sweep trains in one process"):
        sweep.run(runs, cache=tmp_path / "cache", output=tmp_path / "out")
