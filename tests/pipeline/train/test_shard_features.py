"""``pipeline train --shard-features``: what several processes publish together is what one of them would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from tailrace.pipeline.cli import cli
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.artifact import verify_artifact
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.settings import TrainSettings
from tests.support.sharded_runs import publish_sharded
from tests.support.training_caches import publish_layers, small_cache

SETTINGS: dict[str, Any] = {
    "d_sae": 24,
    "steps": 12,
    "batch_rows": 65,
    "lr": 1e-2,
    "log_every": 4,
    "evaluate_every": 4,
    "evaluation_rows": 50,
    "precision": "float32",
    "keep_best": True,
    "snapshots": 1,
    "ema": 0.5,
    "gradient_clip": 0.3,
}
CHANGES: dict[str, dict[str, Any]] = {
    "batch_topk": {"architecture": {"kind": "batch_topk", "k": 2, "input_bias": True, "skip": True}},
    "topk": {"architecture": {"kind": "topk", "k": 2}, "decoder_init": "data", "max_norm_multiple": 1.5},
    "matryoshka": {"architecture": {"kind": "matryoshka", "k": 2, "levels": 4}, "optimiser": "adamw"},
    "gated": {"architecture": {"kind": "gated"}, "encoder_init": "kaiming"},
    "across layers": {"architecture": {"kind": "batch_topk", "k": 2}, "cross_layer": True},
    "relu across layers": {"architecture": {"kind": "relu"}, "cross_layer": True},
    "jumprelu across layers": {"architecture": {"kind": "jumprelu"}, "cross_layer": True, "max_norm_multiple": 2.0},
}
ROUNDING = 1e-4
"""Sums over features are taken in another order; twelve steps of Adam in float32 amplify that."""


class Killed(Exception):
    """A run that was ended from outside."""


def numbers_of(path: Path) -> list[dict[str, float]]:
    """Return the numbers of every line of the log, and the scores of the manifest."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((path / "manifest.json").read_text())
    records = [*lines, *manifest.get("layers", []), *manifest["metrics"].values()]
    return [
        {name: value for name, value in record.items() if isinstance(value, int | float)}
        for record in records
        if isinstance(record, dict)
    ]


def check_published(found: Path, wanted: Path) -> None:
    for weights in ("weights.safetensors", "best.safetensors", "snapshots/000000006.safetensors"):
        ours, theirs = load_file(found / weights), load_file(wanted / weights)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name].shape == values.shape, name
            own = ours[name]
            if name == "log_threshold":  # a threshold of zero has none that is finite
                own, values = own.exp(), values.exp()
            assert float((own - values).abs().max()) <= ROUNDING * float(values.abs().max()), name
    lines = list(zip(numbers_of(found), numbers_of(wanted), strict=True))
    assert len(lines) > 5
    for logged, other in lines:
        assert logged.keys() == other.keys()
        assert logged == pytest.approx(other, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_processes_publish_what_one_does_and_continue_in_any_number(name: str, tmp_path: Path) -> None:
    settings = TrainSettings.read(SETTINGS, CHANGES[name])
    cache = publish_layers(tmp_path / "cache") if settings.cross_layer else small_cache(tmp_path / "cache")
    alone = train.run(settings, cache=cache, output=tmp_path / "alone", compute=Compute(quiet=True)).path
    together = publish_sharded(2, settings, cache=cache, output=tmp_path / "together").path
    check_published(together, alone)

    def kill(step: int, _: Transcoder) -> None:
        if step == 8:
            raise Killed

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        publish_sharded(4, settings, cache=cache, output=cut, checkpoint_steps=3, hooks=[(1, kill)])
    assert Checkpoints(cut / "checkpoints").steps() == [3, 6]
    publish_sharded(2, settings, cache=cache, output=cut)
    check_published(cut, alone)
    kind = "cross_layer_transcoder" if settings.cross_layer else "transcoder"
    assert verify_artifact(cut, kind) == []
    assert not (cut / "checkpoints").exists()


def test_what_a_share_costs_is_said_before_anything_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small_cache(tmp_path / "cache")
    command = ["train", str(cache), "--out", str(tmp_path / "out"), "--d-sae", "240", "--steps", "5", "--dry-run"]

    def run(*flags: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, [*command, *flags])
        return done.exit_code, f"{done.output}{done.exception}"

    _, alone = run()
    code, said = run("--shard-features")
    assert code == 1
    assert "this is the only one; use torchrun" in said
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, shared = run("--shard-features")
    assert "of memory on each device;" in shared
    assert alone.split("at least ")[1].split(";")[0] not in shared
    monkeypatch.setenv("RANK", "1")
    assert "cost:" not in run("--shard-features")[1]
    monkeypatch.setenv("WORLD_SIZE", "7")
    code, said = run("--shard-features")
    assert code == 1
    assert "d_sae: 7 processes cannot have equal shares of 240 features" in said
    assert not (tmp_path / "out").exists()
