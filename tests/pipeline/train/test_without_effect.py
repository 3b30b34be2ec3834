"""Settings that a run never comes to are named before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.training.loop.settings import TrainSettings
from tests.support.training_caches import small_cache


def sentences(**settings: object) -> str:
    return "\n".join(TrainSettings.model_validate(settings).without_effect(n_steps=100))


def test_the_defaults_and_fitting_settings_are_silent() -> None:
    assert sentences() == ""
    assert sentences(warmup_steps=99, decay_steps=10) == ""
    assert sentences(schedule="cosine_restarts", cycles=3, final_lr=0.2) == ""
    assert sentences(auxiliary={"kind": "auxk"}, dead_after_steps=50) == ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"warmup_steps": 100}, "warmup_steps 100 is as long as the run of 100 steps"),
        ({"cycles": 2}, "cycles belongs to schedule cosine_restarts; schedule is linear"),
        ({"final_lr": 0.1, "schedule": "constant"}, "final_lr belongs to schedule cosine or cosine_restarts"),
        ({"decay_steps": 5, "schedule": "cosine"}, "decay_steps belongs to schedule linear"),
        ({"auxiliary": {"kind": "auxk"}}, "dead_after_steps 1000 is as long as the run of 100 steps"),
        ({"architecture": {"kind": "topk", "k": 4, "k_start": 9, "k_warmup_steps": 100}}, "k_warmup_steps 100"),
        ({"architecture": {"kind": "relu", "l1_warmup_steps": 200}}, "l1_warmup_steps 200"),
    ],
)
def test_a_setting_without_effect_is_named_with_the_reason(settings: dict[str, object], named: str) -> None:
    assert named in sentences(**settings)


def test_training_says_so_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = TrainSettings.model_validate(
        {"d_sae": 8, "steps": 2, "batch_rows": 64, "warmup_steps": 5, "architecture": {"kind": "topk", "k": 2}}
    )
    train.run(settings, cache=small_cache(tmp_path / "cache"), output=tmp_path / "out", compute=Compute(quiet=True))
    assert "warmup_steps 5 is as long as the run of 2 steps" in caplog.text
