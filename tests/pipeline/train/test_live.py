"""``pipeline train`` on live rows, from existing weights, and with the language model scored on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.cache.recorded_model import open_recorded_model
from tailrace.pipeline.live.batches import LiveBatches
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.loss_hooks import SplicedLoss
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.pipeline.train.stage import TrainResult
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tests.pipeline.train.test_resume import results
from tests.support.cache_jobs import command, differing, model_folder, run_cache, text_file
from tests.support.live_runs import live_settings
from tests.support.quick import quick

BASE: dict[str, Any] = {
    "architecture": {"kind": "topk", "k": 4},
    "d_sae": 32,
    "steps": 12,
    "batch_rows": 32,
    "lr": 1e-2,
    "log_every": 4,
    "evaluate_every": 5,
}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.read(BASE, changes)


def run_live(output: Path, live: dict[str, Any] | None = None, **arguments: Any) -> TrainResult:
    chosen = arguments.pop("settings", settings())
    return train.run(
        chosen, live=live_settings(**live or {}), output=output, compute=Compute(threads=1, quiet=True), **arguments
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run_live(tmp_path_factory.mktemp("live") / "transcoder")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same text, model and held-out documents."""
    path = tmp_path_factory.mktemp("cached") / "cache"
    run_cache(path, tokens="all", holdout="3", layers="0")
    return path


def test_a_live_transcoder_is_published_like_any_and_says_what_it_was_trained_on(
    trained: TrainResult, cache: Path
) -> None:
    assert verify_artifact(trained.path, "transcoder") == []
    assert not (trained.path / "checkpoints").exists()
    manifest = json.loads((trained.path / "manifest.json").read_text())
    assert manifest["request"]["live"]["dataset"] == str(text_file())
    origin = manifest["inputs"]["live"]
    assert set(origin) == {"text", "packing", "mixing"}
    assert origin["mixing"] == {"seed": 0, "block_rows": 192, "batch_rows": 32}
    assert manifest["site"]["name"] == "layer0"
    assert manifest["model"] == open_cache(cache).manifest.model
    assert manifest["metrics"]["heldout"]["n_rows"] == 315
    assert load_transcoder(trained.path).d_sae == 32


def test_live_weights_are_those_of_the_live_batches_fed_by_hand(trained: TrainResult) -> None:
    on = torch.device("cpu")
    precision = resolve_precision("auto", on)
    with LiveBatches(live_settings(), batch_rows=32) as live:
        site = live.sites["layer0"]
        torch.set_num_threads(1)
        run = build_run(settings(), site, live.statistics["layer0"], n_steps=12, device=on, precision=precision)
        for _ in range(12):
            run.step(live.next_batch())
    assert torch.equal(run.folded().W_dec, load_transcoder(trained.path).W_dec)


@pytest.mark.parametrize("step", quick([1, 6, 11], 6))
def test_an_interrupted_live_run_ends_with_the_same_bytes(
    trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def interrupt(at: int, transcoder: Transcoder) -> None:
        if at == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_live(tmp_path / "t", checkpoint_steps=3, hooks=[(1, interrupt)])
    openings = []
    begin = LiveBatches.__init__

    def noted(self: LiveBatches, *arguments: Any, **named: Any) -> None:
        openings.append(named["opening"])
        begin(self, *arguments, **named)

    monkeypatch.setattr(LiveBatches, "__init__", noted)
    run_live(tmp_path / "t", checkpoint_steps=3)
    assert [opening is not None for opening in openings] == [True]
    assert differing(results(tmp_path / "t"), results(trained.path)) == []


def test_a_published_live_run_comes_back_without_the_model_and_another_is_refused(
    trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveBatches, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run_live(trained.path) == trained
    with pytest.raises(ArtifactMismatch, match=r"live\.seed: there it is 0, asked for 5"):
        run_live(trained.path, live={"seed": 5})


def test_bad_settings_of_a_live_run_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        run_live(tmp_path / "t", settings=settings(steps=None, site="layer7", architecture={"kind": "topk", "k": 33}))
    message = str(caught.value)
    assert "epochs: how many rows the text gives is not known in live mode; give rows or steps" in message
    assert "site: there is no site 'layer7'" in message
    assert "33 features per row cannot be chosen from d_sae = 32" in message
    with pytest.raises(SettingsError, match="evaluate_model_every: contexts to run come from a cache"):
        run_live(tmp_path / "t", model_scores=ModelScoreSettings(evaluate_model_every=3))
    assert not (tmp_path / "t").exists()
    with pytest.raises(SettingsError, match="give one of them"):
        train.run(settings(), output=tmp_path / "t")


def test_a_live_sweep_runs_the_model_once_and_equals_runs_alone(trained: TrainResult, tmp_path: Path) -> None:
    runs = {"same": settings(), "other": settings(lr=3e-2, steps=7)}
    swept = sweep.run(runs, live=live_settings(), output=tmp_path / "s", compute=Compute(threads=1, quiet=True))
    assert differing(results(swept.path / "runs" / "same"), results(trained.path)) == []
    assert not (swept.path / "checkpoints").exists()


@pytest.mark.slow
def test_a_cross_layer_transcoder_is_trained_live_and_ends_with_the_same_bytes_if_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(cross_layer=True, architecture={"kind": "batch_topk", "k": 2})
    straight = run_live(tmp_path / "straight", {"layers": "all"}, settings=chosen)
    manifest = json.loads((straight.path / "manifest.json").read_text())
    assert manifest["kind"] == "cross_layer_transcoder"
    assert [site["name"] for site in manifest["sites"]] == ["layer0", "layer1"]
    assert [layer["n_rows"] for layer in manifest["layers"]] == [315, 315]
    step = TrainingRun.step

    def interrupted(self: TrainingRun, batches: Any) -> None:
        if self.n_steps_done == 9:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_live(tmp_path / "cut", {"layers": "all"}, settings=chosen, checkpoint_steps=4)
    cut = run_live(tmp_path / "cut", {"layers": "all"}, settings=chosen)
    for name in ("weights.safetensors", "metrics.jsonl", "manifest.json"):
        assert (cut.path / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_a_wrong_run_of_a_live_sweep_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveBatches, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    runs = {"right": settings(), "wrong": settings(steps=None), "also": settings(bias_init="geometric_median")}
    with pytest.raises(SettingsError) as refused:
        sweep.run(runs, live=live_settings(), output=tmp_path / "s", compute=Compute(threads=1, quiet=True))
    assert "wrong: epochs: how many rows the text gives" in str(refused.value)
    assert "also: bias_init: geometric_median" in str(refused.value)
    assert not (tmp_path / "s").exists()


def test_the_command_trains_live_and_one_seed_feeds_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--steps", 4, "--batch-rows", 32, "--d-sae", 32, "--k", 4, "--threads", 1, "--out", tmp_path / "t"]
    live = [
        "--model", model_folder(), "--dataset", text_file(), "--layers", 0, "--context-length", 16,
        "--contexts-per-batch", 4, "--buffer-rows", 384, "--holdout", "3", "--seed", 3,
    ]  # fmt: skip
    answer = command(capsys, "train", "--live", *live, *shared)
    assert answer.code == 0, answer.err
    assert "4 steps, held-out FVU" in answer.out
    request = json.loads((tmp_path / "t" / "manifest.json").read_text())["request"]
    assert (request["settings"]["seed"], request["live"]["seed"]) == (3, 3)
    assert command(capsys, "info", tmp_path / "t").code == 0
    wrong = command(capsys, "train", "cache", *live, *shared)
    assert wrong.code == 2
    assert "--layers, --context-length" in wrong.err.replace("--dataset, ", "")
    assert "only with --live" in wrong.err
    missing = command(capsys, "train", "--live", *shared)
    assert all(line in missing.err for line in ("dataset: is required", "model: is required"))
    for both in (["train", "cache", "--live", *shared], ["train", *shared]):
        assert command(capsys, *both).code == 2


# ---- starting from a transcoder


def test_a_run_starts_from_the_weights_of_a_transcoder(cache: Path, tmp_path: Path) -> None:
    first = train.run(settings(), cache=cache, output=tmp_path / "first", compute=Compute(threads=1, quiet=True))
    # one step at a learning rate of next to nothing leaves the weights where they started
    still = settings(steps=1, lr=1e-12)
    second = train.run(
        still, cache=cache, output=tmp_path / "second", compute=Compute(threads=1, quiet=True), start_from=first.path
    )
    assert second.metrics["heldout"]["fvu"] == pytest.approx(first.metrics["heldout"]["fvu"], rel=1e-4)
    before, after = load_transcoder(first.path), load_transcoder(second.path)
    rows = torch.from_numpy(np.random.Generator(np.random.Philox(0)).standard_normal((50, 16)).astype(np.float32))
    assert torch.allclose(before(rows), after(rows), atol=1e-4)
    manifest = json.loads((second.path / "manifest.json").read_text())
    digest = json.loads((first.path / "manifest.json").read_text())["digest"]
    assert manifest["request"]["from"] == manifest["inputs"]["transcoder"] == {"digest": digest}
    with pytest.raises(ArtifactMismatch, match="from: is there, not asked for"):
        train.run(still, cache=cache, output=second.path, compute=Compute(threads=1, quiet=True))


def test_a_transcoder_of_another_shape_is_refused_with_every_difference(cache: Path, tmp_path: Path) -> None:
    first = train.run(settings(steps=1), cache=cache, output=tmp_path / "first", compute=Compute(threads=1, quiet=True))
    other = settings(architecture={"kind": "relu", "skip": True}, d_sae=48)
    with pytest.raises(SettingsError) as caught:
        train.run(
            other, cache=cache, output=tmp_path / "t", compute=Compute(threads=1, quiet=True), start_from=first.path
        )
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        f"  architecture: {first.path} has 'topk', this run 'relu'",
        f"  architecture.skip: {first.path} has False, this run True",
        f"  d_sae: {first.path} has 32, this run 48",
    ]
    assert not (tmp_path / "t").exists()


# ---- the language model scored on the way


def test_scores_of_the_model_are_those_of_the_hook_and_part_of_the_run(cache: Path, tmp_path: Path) -> None:
    scores = ModelScoreSettings(evaluate_model_every=5, evaluate_model_contexts=3)
    result = train.run(
        settings(), cache=cache, output=tmp_path / "t", compute=Compute(threads=1, quiet=True), model_scores=scores
    )
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["split"] == "model"]
    assert [line["step"] for line in found] == [5, 10, 12]
    hook = SplicedLoss(open_recorded_model(open_cache(cache)), ["layer0"], n_contexts=3)
    expected = hook(12, load_transcoder(result.path))
    assert {name: found[-1][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result.metrics["model"]["ce_recovered"] == found[-1]["ce_recovered"]
    with pytest.raises(ArtifactMismatch, match="model_scores"):
        train.run(settings(), cache=cache, output=result.path, compute=Compute(threads=1, quiet=True))


def test_dead_features_are_resampled_by_what_rows_cost_the_model(cache: Path, tmp_path: Path) -> None:
    resampling = {"kind": "anthropic", "resample_by": "model_loss", "resample_every": 4, "resample_rows": 32}
    result = train.run(
        settings(resampling=resampling),
        cache=cache, output=tmp_path / "t", compute=Compute(threads=1, quiet=True),
    )  # fmt: skip
    plain = train.run(settings(), cache=cache, output=tmp_path / "plain", compute=Compute(threads=1, quiet=True))
    assert result.metrics["heldout"] != plain.metrics["heldout"]


def test_a_dry_run_says_what_live_rows_cost_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--context-length", 16, "--layers", "0,1", "--d-sae", 32, "--k", 4, "--batch-rows", 32, "--threads", 1)
    live = ("train", "--live", "--model", model_folder(), "--dataset", text_file(), *small, "--dry-run")
    answer = command(capsys, *live, "--steps", 12, "--site", "layer1", "--out", tmp_path / "new" / "out")
    assert answer.code == 0, answer
    rows, cost = answer.out.splitlines()[-2:]
    assert re.fullmatch(
        r"live rows: 384, about 1 s at the [\d,]+ rows/s just measured; [\d.]+ [kM]B of memory for the buffer", rows
    )
    assert cost.startswith("cost: 12 steps of 32 rows; at least ")
    assert not (tmp_path / "new").exists()
    answer = command(capsys, *live, "--epochs", 1, "--decoder-init", "data", "--out", tmp_path / "new")
    assert answer.code == 2
    assert "not known in live mode; give rows or steps" in answer.err
    assert "decoder_init: data needs training rows drawn at random" in answer.err
