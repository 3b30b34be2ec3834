"""What a run leaves besides weights: metrics with histograms, the best weights, how often features fired."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import TrainResult, run
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import TopK
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.dead_features.resampling.settings import ResampledRun
from tailrace.training.loop.evaluate import evaluate, predictor
from tailrace.training.loop.session import N_RESAMPLED, Session, log_sparsity_name
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import iter_once
from tests.support import resampled_runs
from tests.support.planted_runs import PlantedRows, build
from tests.support.training_caches import publish_cache, random_rows, small_cache

QUICK: dict[str, Any] = {
    "architecture": {"kind": "relu", "l1": 0.02},
    "d_sae": 24,
    "steps": 50,
    "batch_rows": 64,
    "lr": 1e-2,
    "log_every": 20,
    "evaluate_every": 10,
    "evaluation_rows": 40,
    "feature_sampling_window": 15,
    "keep_best": True,
    "snapshots": 2,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("trained") / "transcoder"
    return run(TrainSettings.read(QUICK), cache=cache, output=output, compute=Compute(quiet=True))


def lines(path: Path, split: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def test_every_weights_file_has_its_log_frequencies_beside_it_and_all_are_part_of_the_artifact(
    trained: TrainResult,
) -> None:
    assert verify_artifact(trained.path, "transcoder") == []
    files = json.loads((trained.path / "manifest.json").read_text())["files"]
    weights = {"weights.safetensors", "best.safetensors"}
    weights |= {"snapshots/000000017.safetensors", "snapshots/000000033.safetensors"}
    assert set(files) == weights | {log_sparsity_name(name) for name in weights} | {"metrics.jsonl"}
    for name in weights:
        (log10,) = load_file(trained.path / log_sparsity_name(name)).values()
        assert (log10.shape, log10.dtype) == ((24,), torch.float32)
        assert float(log10.min()) >= -10
        assert float(log10.max()) <= 1e-6


def test_frequencies_are_defined_before_the_first_window_is_complete(cache: Path, tmp_path: Path) -> None:
    # so that a run shorter than a window has them too
    settings = TrainSettings.read(QUICK, {"steps": 3, "snapshots": 2, "evaluate_every": 1})
    path = run(settings, cache=cache, output=tmp_path / "transcoder", compute=Compute(quiet=True)).path
    assert verify_artifact(path, "transcoder") == []
    for name in ("weights", "best", "snapshots/000000001", "snapshots/000000002"):
        assert load_file(path / log_sparsity_name(f"{name}.safetensors"))["log_feature_sparsity"].isfinite().all()
    assert [line["window_rows"] for line in lines(path, "features")] == [3 * 64]


def test_feature_histogram_is_logged_at_every_window_and_at_the_end(trained: TrainResult) -> None:
    found = lines(trained.path, "features")
    assert [line["step"] for line in found] == [15, 30, 45, 50]
    assert {line["window_rows"] for line in found} == {15 * 64}
    for line in found:
        assert sum(line["plots/feature_density_line_chart"]["counts"]) == 24
    saved = load_file(trained.path / "log_feature_sparsity.safetensors")["log_feature_sparsity"]
    assert found[-1]["metrics/mean_log10_feature_sparsity"] == pytest.approx(float(saved.double().mean()), abs=1e-6)


def test_training_lines_agree_with_themselves_under_both_sets_of_names(trained: TrainResult) -> None:
    found = lines(trained.path, "train")
    assert [line["step"] for line in found] == [20, 40, 50]
    for line in found:
        assert line["losses/overall_loss"] == line["loss"]
        assert line["losses/mse_loss"] == line["reconstruction"]
        assert 0.02 * line["losses/l1_loss"] == pytest.approx(line["sparsity"], rel=1e-5)
        assert line["metrics/l0"] == pytest.approx(line["l0"])
        assert line["l0_min"] <= line["l0"] <= line["l0_max"]
        assert line["details/current_learning_rate"] == line["lr"]
        assert line["details/n_training_tokens"] == line["rows"] == line["step"] * 64
        assert line["metrics/explained_variance"] <= 1


def test_fvu_of_a_batch_of_all_rows_is_the_loss_in_units_of_their_variance(cache: Path, tmp_path: Path) -> None:
    settings = TrainSettings.read(QUICK, {"steps": 4, "batch_rows": 640, "log_every": 2, "snapshots": 0})
    path = run(settings, cache=cache, output=tmp_path / "transcoder", compute=Compute(quiet=True)).path
    for line in lines(path, "train"):
        assert line["fvu"] == pytest.approx(line["reconstruction"], rel=1e-4)


def test_best_weights_have_the_lowest_score_of_all_on_the_same_rows(cache: Path, tmp_path: Path) -> None:
    # a learning rate that grows too large: the best step is not the last
    settings = TrainSettings.read(QUICK, {"lr": 3.0, "warmup_steps": 50, "decay_steps": 0})
    result = run(settings, cache=cache, output=tmp_path / "transcoder", compute=Compute(quiet=True))
    best = result.metrics["best"]
    scored = {line["step"]: line["fvu"] for line in lines(result.path, "heldout") if line["step"] < 50}
    assert best["step"] == min(scored, key=lambda step: scored[step]) < 40
    assert best["fvu"] == scored[best["step"]]
    assert best["n_rows"] == 40
    opened = open_cache(cache)
    batches = iter_once(opened.split("heldout"), opened.sites["mlp"], batch_rows=64, max_rows=40)
    kept = evaluate(predictor(load_transcoder(result.path, "best.safetensors")), batches)
    assert kept.fvu == pytest.approx(best["fvu"], rel=1e-4)


def test_the_last_weights_can_be_the_best_on_the_same_rows_as_the_others(cache: Path, trained: TrainResult) -> None:
    opened = open_cache(cache)

    def score(name: str) -> float:
        batches = iter_once(opened.split("heldout"), opened.sites["mlp"], batch_rows=64, max_rows=40)
        fvu = evaluate(predictor(load_transcoder(trained.path, name)), batches).fvu
        assert fvu is not None
        return fvu

    earlier = min(line["fvu"] for line in lines(trained.path, "heldout")[:-1])
    assert trained.metrics["best"]["fvu"] == pytest.approx(min(earlier, score("weights.safetensors")), rel=1e-4)


def test_resamplers_count_features_under_the_name_that_the_log_reads() -> None:
    resampling = {"kind": "anthropic", "resample_every": 4, "resample_rows": 64}
    run = resampled_runs.build({"resampling": resampling}, n_steps=20, row_source=resampled_runs.PlantedSource())
    resampled_runs.kill(run, 3)
    resampled_runs.take_steps(run, 4)
    assert run.latest_extras[N_RESAMPLED] == 3


class TwoEverySecondStep:
    """Stands in for a resampler: says that two features were resampled in every second step."""

    def after_step(self, run: ResampledRun) -> dict[str, float]:
        return {N_RESAMPLED: 2.0 * (run.n_steps_done // 2)}

    def lr_factor(self, step: int) -> float:
        return 1.0

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...


def test_resampled_features_are_logged_once_even_across_a_resume(tmp_path: Path) -> None:
    settings = TrainSettings.read({"architecture": {"kind": "topk", "k": 2}, "d_sae": 8, "log_every": 5})

    def advance(first: int, last: int) -> None:
        stream = PlantedRows(batch_rows=16)
        run = build(stream, TopK(k=2), 10, d_sae=8)
        run._resampler = TwoEverySecondStep()
        with Session(tmp_path, run, settings, n_steps=10, heldout=None, checkpoint_steps=7) as session:
            session.resume(first or None)
            callbacks = session.callbacks(stream)
            for step in range(first + 1, last + 1):
                run.step(stream.next_batch())
                for callback in callbacks:
                    if callback.due(step):
                        callback.action(step)

    advance(0, 9)  # ends between two lines, after the checkpoint at 7
    advance(7, 10)
    found = [(line["step"], line["metrics/n_resampled_neurons"]) for line in lines(tmp_path, "train")]
    assert found == [(5, 4), (10, 6)]


def test_keeping_the_best_without_held_out_rows_is_refused_before_training(tmp_path: Path) -> None:
    cache = publish_cache(tmp_path / "cache", {"mlp": {"train": random_rows(1, 128, 6, 5)}})
    with pytest.raises(SettingsError, match="keep_best needs held-out rows"):
        run(TrainSettings.read(QUICK), cache=cache, output=tmp_path / "transcoder", compute=Compute(quiet=True))
