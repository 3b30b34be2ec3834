"""Interrupted and resumed equals uninterrupted, byte for byte, for every architecture with everything switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import run
from tailrace.training.architectures import ARCHITECTURES
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.settings import TrainSettings
from tests.pipeline.train.test_resume import results
from tests.support.quick import diagonal
from tests.support.training_caches import small_cache

N_STEPS = 23
EVERYTHING: dict[str, Any] = {
    "d_sae": 80,
    "steps": N_STEPS,
    "batch_rows": 64,  # 10 steps to an epoch
    "lr": 1e-2,
    "ema": 0.9,
    "gradient_clip": 0.5,
    "keep_best": True,
    "snapshots": 3,
    "feature_sampling_window": 4,
    "log_every": 3,
    "evaluate_every": 2,
    "evaluation_rows": 50,
    "dead_after_steps": 3,
}
CHECKPOINT_STEPS = 5
INTERRUPTED_AT = 13
"""The checkpoint before, at 10, lies inside a sampling window and before other best weights and a snapshot."""

OPTIONS: dict[str, dict[str, Any]] = {
    "auto-adam": {"kernel": "auto", "optimiser": "adam"},
    "dense-adam": {"kernel": "dense", "optimiser": "adam"},
    "dense-adamw-auxk": {"kernel": "dense", "optimiser": "adamw", "auxiliary": {"kind": "auxk"}},
    "sparse-muon": {"kernel": "sparse", "optimiser": "muon"},
    "sparse-adam-ghost": {"kernel": "sparse", "optimiser": "adam", "auxiliary": {"kind": "ghost"}},
}
FEW: dict[str, dict[str, Any]] = {
    "topk": {"k": 3, "k_start": 6, "k_warmup_steps": 15},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3, "levels": 3},
    "jumprelu": {"l0_warmup_steps": 15},
    "relu": {"l1_warmup_steps": 15},
    "gated": {"l1_warmup_steps": 15},
}
"""Settings with state or courses of their own, by architecture."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.mark.parametrize(
    ("kind", "option"),
    diagonal([architecture.model_fields["kind"].default for architecture in ARCHITECTURES], OPTIONS),
)
def test_resumed_is_uninterrupted_with_every_option_on(cache: Path, tmp_path: Path, kind: str, option: str) -> None:
    settings = TrainSettings.read(EVERYTHING, {"architecture": {"kind": kind, **FEW[kind]}}, OPTIONS[option])

    def interrupt(at: int, transcoder: Transcoder) -> None:
        if at == INTERRUPTED_AT:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"cache": cache, "compute": Compute(quiet=True), "checkpoint_steps": CHECKPOINT_STEPS}
    run(settings, output=tmp_path / "whole", **{**arguments, "checkpoint_steps": 10**9})
    with pytest.raises(KeyboardInterrupt):
        run(settings, output=tmp_path / "resumed", hooks=[(1, interrupt)], **arguments)
    kept = sorted(file.name for file in (tmp_path / "resumed" / "checkpoints").iterdir())
    assert kept == ["000000005.safetensors", "000000010.safetensors"]
    run(settings, output=tmp_path / "resumed", **arguments)
    whole, resumed = results(tmp_path / "whole"), results(tmp_path / "resumed")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if resumed[name] != whole[name]] == []
    assert {"best.safetensors", "snapshots/000000012_log_feature_sparsity.safetensors"} <= whole.keys()
