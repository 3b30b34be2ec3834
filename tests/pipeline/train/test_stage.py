"""The stage ``pipeline train``: what it publishes, what it refuses, what a transcoder is without its cache."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import TrainResult, run
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import (
    ArtifactCorrupt,
    ArtifactIncomplete,
    ArtifactMismatch,
    ArtifactMissing,
    DeviceLostError,
    NoOrdinaryRows,
    OutOfMemoryError,
    SettingsError,
    StorageFull,
)
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import load_transcoder, write_tensors
from tailrace.training.loop.evaluate import evaluate, predictor
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import iter_once
from tests.support.training_caches import publish_cache, random_rows, small_cache

QUICK: dict[str, Any] = {
    "architecture": {"kind": "topk", "k": 2},
    "d_sae": 24,
    "steps": 60,
    "batch_rows": 64,
    "lr": 1e-2,
}


def train_on(cache: Path, output: Path, **changes: Any) -> TrainResult:
    return run(TrainSettings.read(QUICK, changes), cache=cache, output=output, compute=Compute(quiet=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_on(cache, tmp_path_factory.mktemp("trained") / "transcoder", snapshots=1)


def test_published_transcoder_is_whole_and_keeps_no_checkpoints(trained: TrainResult) -> None:
    assert verify_artifact(trained.path, "transcoder") == []
    manifest = json.loads((trained.path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [
        "log_feature_sparsity.safetensors",
        "metrics.jsonl",
        "snapshots/000000030.safetensors",
        "snapshots/000000030_log_feature_sparsity.safetensors",
        "weights.safetensors",
    ]
    assert not (trained.path / "checkpoints").exists()


def test_manifest_names_cache_model_and_site(cache: Path, trained: TrainResult) -> None:
    manifest = json.loads((trained.path / "manifest.json").read_text())
    opened = open_cache(cache)
    assert manifest["inputs"]["cache"] == opened.reference
    assert manifest["model"] == {"name": "tiny"}
    assert (manifest["site"]["name"], manifest["site"]["d_in"], manifest["site"]["d_out"]) == ("mlp", 6, 5)
    assert (manifest["architecture"]["kind"], manifest["architecture"]["k"]) == ("topk", 2)


def test_saved_weights_have_the_score_the_run_reported_on_raw_rows(cache: Path, trained: TrainResult) -> None:
    opened = open_cache(cache)
    batches = iter_once(opened.split("heldout"), opened.sites["mlp"], batch_rows=32)
    score = evaluate(predictor(load_transcoder(trained.path)), batches)
    assert score.n_rows == 96
    assert score.record() == pytest.approx(trained.metrics["heldout"], rel=1e-4)


def test_metrics_file_ends_with_the_score_over_all_held_out_rows(trained: TrainResult) -> None:
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert sum(lines[-1].pop("log10_frequency")["counts"]) == QUICK["d_sae"]
    assert lines[-1] == {"step": 60, "rows": 60 * 64, "split": "heldout", **trained.metrics["heldout"]}
    assert lines[-2]["split"] == "train"


def test_training_improves_on_predicting_the_mean(trained: TrainResult) -> None:
    assert trained.metrics["heldout"]["fvu"] < 0.8


def test_a_transcoder_loads_without_its_cache(tmp_path: Path) -> None:
    cache = small_cache(tmp_path / "cache")
    path = train_on(cache, tmp_path / "transcoder").path
    shutil.rmtree(cache)
    transcoder = load_transcoder(path)
    assert (transcoder.d_in, transcoder.d_out, transcoder.d_sae) == (6, 5, 24)
    activations = transcoder.encode(torch.ones(3, 6))
    assert activations.shape == (3, 24)
    assert torch.equal(transcoder(torch.ones(3, 6)), transcoder.decode(activations))


def test_a_snapshot_loads_like_the_final_weights(trained: TrainResult) -> None:
    halfway = load_transcoder(trained.path, "snapshots/000000030.safetensors")
    assert not torch.equal(halfway.W_enc, load_transcoder(trained.path).W_enc)


def test_relu_is_published_without_its_input_bias(cache: Path, tmp_path: Path) -> None:
    result = train_on(cache, tmp_path / "relu", architecture={"kind": "relu", "l1": 0.1})
    assert load_transcoder(result.path).b_dec is None
    assert result.metrics["heldout"]["l0"] > 0


def test_an_sae_site_is_trained_to_reconstruct_its_inputs(tmp_path: Path) -> None:
    rows = {split: random_rows(seed, n, 6, 6)[0] for split, seed, n in (("train", 1, 320), ("heldout", 2, 64))}
    path = publish_cache(tmp_path / "cache", {"resid": {split: (values, values) for split, values in rows.items()}})
    result = train_on(path, tmp_path / "sae", steps=200, decay_steps=0)
    outputs = load_transcoder(result.path)(torch.from_numpy(rows["heldout"])).numpy()
    unexplained = np.sum((outputs - rows["heldout"]) ** 2) / np.sum((rows["heldout"] - rows["heldout"].mean(0)) ** 2)
    assert unexplained == pytest.approx(result.metrics["heldout"]["fvu"], rel=1e-3)
    assert unexplained < 0.6


def test_a_cache_without_held_out_rows_trains_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = publish_cache(tmp_path / "cache", {"mlp": {"train": random_rows(1, 128, 4, 3)}})
    result = train_on(cache, tmp_path / "transcoder")
    assert "heldout" not in result.metrics
    assert "no held-out rows" in caplog.text


def test_the_same_command_again_returns_the_published_result(trained: TrainResult, cache: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in trained.path.iterdir()}
    again = train_on(cache, trained.path, snapshots=1)
    assert again == trained
    assert {file: file.stat().st_mtime_ns for file in trained.path.iterdir()} == before


def test_another_setting_on_the_same_path_is_refused_with_both_values(trained: TrainResult, cache: Path) -> None:
    with pytest.raises(ArtifactMismatch, match=r"settings\.lr: there it is 0\.01, asked for 0\.5"):
        train_on(cache, trained.path, snapshots=1, lr=0.5)


def test_fresh_throws_away_an_unfinished_run_but_never_a_published_one(
    cache: Path, trained: TrainResult, tmp_path: Path
) -> None:
    def interrupt(step: int, transcoder: Transcoder) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "transcoder"
    settings = TrainSettings.read(QUICK)
    with pytest.raises(KeyboardInterrupt):
        run(
            settings,
            cache=cache,
            output=output,
            compute=Compute(quiet=True),
            checkpoint_steps=5,
            hooks=[(11, interrupt)],
        )
    with pytest.raises(ArtifactIncomplete):
        load_transcoder(output)
    assert summarise(output)["steps kept"] == 10
    other = TrainSettings.read(QUICK, {"lr": 0.02})
    with pytest.raises(ArtifactMismatch, match="or throw it away with --fresh"):
        run(other, cache=cache, output=output, compute=Compute(quiet=True))
    assert run(other, cache=cache, output=output, compute=Compute(quiet=True), fresh=True).metrics["steps"] == 60
    with pytest.raises(ArtifactMismatch, match="is published"):
        run(settings, cache=cache, output=trained.path, compute=Compute(quiet=True), fresh=True)


def test_a_step_without_a_row_to_learn_from_keeps_the_checkpoints_before_it(cache: Path, tmp_path: Path) -> None:
    output, strict = tmp_path / "transcoder", {"batch_rows": 1, "max_norm_multiple": 1.6}
    with pytest.raises(NoOrdinaryRows, match="What there is from before is kept"):
        run(
            TrainSettings.read(QUICK, strict),
            cache=cache,
            output=output,
            compute=Compute(quiet=True),
            checkpoint_steps=1,
        )
    assert list((output / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("kept", ["snapshots", "metrics", None])
def test_what_is_refused_after_a_step_deletes_only_a_draft_that_holds_nothing(
    cache: Path, tmp_path: Path, kept: str | None
) -> None:
    def refuse(step: int, transcoder: Transcoder) -> None:
        raise SettingsError("as whatever a step calls may")

    output = tmp_path / "new" / "transcoder"
    changes = {"snapshots": {"snapshots": 30}, "metrics": {"log_every": 2}, None: {}}[kept]
    settings = TrainSettings.read(QUICK, {"log_every": 50, "evaluate_every": 50, **changes})
    with pytest.raises(SettingsError, match="whatever a step calls"):
        run(settings, cache=cache, output=output, compute=Compute(quiet=True), hooks=[(5, refuse)])
    assert (tmp_path / "new").exists() == (kept is not None)
    assert (output / "request.json").exists() == (kept is not None)


def test_a_misspelt_site_is_answered_with_the_near_ones(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no site 'mpl'; did you mean mlp\?"):
        train_on(cache, tmp_path / "transcoder", site="mpl")
    assert not (tmp_path / "transcoder").exists()


def test_a_cache_of_several_sites_wants_one_chosen(tmp_path: Path) -> None:
    sites = {name: {"train": random_rows(1, 64, 4, 3)} for name in ("layer0", "layer1")}
    cache = publish_cache(tmp_path / "cache", sites)
    with pytest.raises(SettingsError) as caught:
        train_on(cache, tmp_path / "transcoder", architecture={"kind": "topk", "k": 25})
    assert "choose one with --site, all with --sweep site=layer0,layer1 or, as one" in str(caught.value)
    assert "cannot be chosen from d_sae = 24" in str(caught.value)  # both problems at once


def test_an_unknown_device_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--device abacus"):
        run(
            TrainSettings.read(QUICK),
            cache=cache,
            output=tmp_path / "transcoder",
            compute=Compute(device="abacus", quiet=True),
        )


def test_threads_are_given_back(cache: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(
        TrainSettings.read(QUICK),
        cache=cache,
        output=tmp_path / "transcoder",
        compute=Compute(threads=before + 1, quiet=True),
    )
    assert torch.get_num_threads() == before


def test_nothing_at_a_path_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="there is no transcoder here"):
        load_transcoder(tmp_path / "nowhere")


def test_weights_that_do_not_fit_their_manifest_are_refused(trained: TrainResult, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    write_tensors(copy / "weights.safetensors", {"W_enc": torch.zeros(2, 2)})
    with pytest.raises(ArtifactCorrupt, match=r"weights\.safetensors: has \d+ bytes, its record says"):
        load_transcoder(copy)


def test_a_disk_that_refuses_says_what_to_do_and_leaves_no_file(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))  # the kernel refuses to write past 1000 bytes
    try:
        with pytest.raises(StorageFull, match="run the same command again"):
            write_tensors(tmp_path / "weights.safetensors", {"W": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_explained(cache: Path, tmp_path: Path) -> None:
    def run_out(step: int, transcoder: Transcoder) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    arguments: dict[str, Any] = {"cache": cache, "output": tmp_path / "run", "compute": Compute(quiet=True)}
    with pytest.raises(OutOfMemoryError) as caught:
        run(TrainSettings.read(QUICK), **arguments, checkpoint_steps=5, hooks=[(11, run_out)])
    message = str(caught.value)
    assert message.startswith("--device cpu: its memory is not enough (CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "lower batch_rows or d_sae" in message
    # what was reached is kept
    assert run(TrainSettings.read(QUICK), **arguments).metrics["steps"] == 60


def test_a_gpu_that_is_lost_names_the_checkpoint(cache: Path, tmp_path: Path) -> None:
    def lose(step: int, transcoder: Transcoder) -> None:
        raise DeviceLostError("--device cuda: the GPU stopped answering")

    arguments: dict[str, Any] = {"cache": cache, "compute": Compute(quiet=True), "checkpoint_steps": 5}
    with pytest.raises(DeviceLostError, match=r"stopped answering\. .*one: the newest checkpoint is at step 10"):
        run(TrainSettings.read(QUICK), output=tmp_path / "one", **arguments, hooks=[(11, lose)])
    with pytest.raises(DeviceLostError, match="two: there is no checkpoint yet"):
        run(TrainSettings.read(QUICK), output=tmp_path / "two", **arguments, hooks=[(1, lose)])
