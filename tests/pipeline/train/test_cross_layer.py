"""``pipeline train --cross-layer``: what it publishes, what it learns that layers alone cannot, what it refuses."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.sources import CacheSource, choose_sites
from tailrace.pipeline.train.stage import TrainResult
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.cross_layer.layers import load_cross_layer
from tailrace.training.cross_layer.stack import Stack
from tailrace.training.loop import evaluate
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import command
from tests.support.training_caches import (
    N_HELDOUT,
    hooks,
    publish_cache,
    publish_layers,
    rows_of_layers,
)

SETTINGS: dict[str, Any] = {
    "architecture": {"kind": "batch_topk", "k": 3},
    "cross_layer": True,
    "d_sae": 24,
    "steps": 150,
    "batch_rows": 128,
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_layers(tmp_path_factory.mktemp("layers") / "cache")


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_on(cache, tmp_path_factory.mktemp("trained") / "across", snapshots=1)


def train_on(cache: Path, output: Path, **changes: Any) -> TrainResult:
    settings = TrainSettings.read(SETTINGS, {name: value for name, value in changes.items() if name != "run"})
    return train.run(settings, cache=cache, output=output, compute=Compute(quiet=True), **changes.get("run", {}))


def manifest_of(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return manifest


def fvu(outputs: np.ndarray, predicted: np.ndarray) -> float:
    """Return FVU from its definition, in float64."""
    exact = outputs.astype(np.float64)
    return float(((predicted - exact) ** 2).sum() / ((exact - exact.mean(axis=0)) ** 2).sum())


def test_what_is_published_is_whole_and_says_what_it_is_made_of(cache: Path, trained: TrainResult) -> None:
    assert verify_artifact(trained.path, "cross_layer_transcoder") == []
    manifest = manifest_of(trained.path)
    assert [site["name"] for site in manifest["sites"]] == [hooks(0), hooks(1)]
    assert manifest["inputs"]["cache"] == open_cache(cache).reference
    assert (manifest["d_sae"], manifest["learnt_from"]) == (24, None)
    assert len(manifest["normalisation"]["scale_out"]) == 2
    assert not (trained.path / "checkpoints").exists()
    assert summarise(trained.path)["features"] == "24 a layer, each writing to its own layer and all later ones"


def test_layer_scores_are_those_of_the_published_weights_on_held_out_rows(trained: TrainResult) -> None:
    transcoder = load_cross_layer(trained.path)
    held = rows_of_layers(2, N_HELDOUT)
    inputs = torch.from_numpy(np.concatenate([side for side, _ in held.values()], axis=1))
    activations = transcoder.encode(inputs)
    predicted = transcoder.decode(activations).numpy()
    layers = manifest_of(trained.path)["layers"]
    for number, (_, outputs) in enumerate(held.values()):
        assert layers[number]["fvu"] == pytest.approx(fvu(outputs, predicted[:, number * 6 : number * 6 + 6]), rel=1e-4)
        own = activations[:, transcoder.of_layer(number)] > 0
        assert layers[number]["l0"] == pytest.approx(float(own.sum(1).double().mean()))
    # Every layer counts alike, whatever its scale: the mean of their FVU is what the run reports.
    mean = float(np.mean([layer["fvu"] for layer in layers]))
    assert trained.metrics["heldout"]["fvu"] == pytest.approx(mean, rel=0.05)


def test_however_many_features_there_are_activations_of_few_rows_are_scored_at_a_time(
    cache: Path, trained: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    encode = Stack.encode

    def counted(self: Stack, inputs: torch.Tensor) -> torch.Tensor:
        scored.append(len(inputs))
        return encode(self, inputs)

    monkeypatch.setattr(Stack, "encode", counted)
    monkeypatch.setattr(evaluate, "SCORED_ACTIVATIONS", 2 * 24 * 10)
    result = train_on(cache, tmp_path / "in-pieces")
    assert max(scored) == 10
    assert result.metrics["heldout"]["fvu"] == pytest.approx(trained.metrics["heldout"]["fvu"], rel=1e-5)
    for piecewise, whole in zip(manifest_of(result.path)["layers"], manifest_of(trained.path)["layers"], strict=True):
        assert piecewise.pop("site") == whole.pop("site")
        assert piecewise == pytest.approx(whole, rel=1e-5)


def test_features_that_write_to_later_layers_explain_what_a_layer_alone_cannot(
    cache: Path, trained: TrainResult, tmp_path: Path
) -> None:
    alone = train.run(
        TrainSettings.read(
            SETTINGS, {"cross_layer": False, "site": hooks(1), "architecture": {"kind": "batch_topk", "k": 6}}
        ),
        cache=cache,
        output=tmp_path / "alone",
        compute=Compute(quiet=True),
    )
    inputs, outputs = rows_of_layers(2, N_HELDOUT)[hooks(1)]
    by_itself = fvu(outputs, load_transcoder(alone.path)(torch.from_numpy(inputs)).numpy())
    assert by_itself > 0.45  # half of the variance comes from a layer it does not see
    assert manifest_of(trained.path)["layers"][1]["fvu"] < 0.35


def test_an_interrupted_run_ends_with_the_same_bytes(cache: Path, trained: TrainResult, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    steps = TrainingRun.step

    def interrupted(self: TrainingRun, batches: Any) -> None:
        if self.n_steps_done == 100:
            raise Interrupted
        steps(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "step", interrupted)
        with pytest.raises(Interrupted):
            train_on(cache, tmp_path / "cut", snapshots=1, run={"checkpoint_steps": 40})
    continued = train_on(cache, tmp_path / "cut", snapshots=1)
    for name in ("weights.safetensors", "metrics.jsonl", "manifest.json"):
        ours, theirs = ((path / name).read_bytes() for path in (continued.path, trained.path))
        assert ours == theirs, name
    with pytest.raises(ArtifactMismatch, match=r"lr|settings"):
        train_on(cache, tmp_path / "cut", snapshots=1, lr=2e-2)


@pytest.mark.slow
def test_rows_that_are_too_long_at_any_layer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = publish_layers(tmp_path / "cache", massive=True)
    with caplog.at_level(logging.WARNING):
        train_on(cache, tmp_path / "whole", steps=2)
    assert f"{hooks(0)} has massive activations" in caplog.text
    result = train_on(cache, tmp_path / "ordinary", max_norm_multiple=10)
    manifest = manifest_of(result.path)
    assert set(manifest["learnt_from"]) == {hooks(0), hooks(1)}
    assert result.metrics["heldout"]["n_rows"] == N_HELDOUT - N_HELDOUT // 64
    assert result.metrics["rows"] < 150 * 128
    first, second = manifest["layers"]
    assert (first["n_rows"], first["n_ordinary"]) == (N_HELDOUT, N_HELDOUT - N_HELDOUT // 64)
    assert first["fvu_ordinary"] < 0.6 < first["fvu"]
    assert second["fvu"] < 0.4


def test_everything_that_does_not_fit_is_told_at_once(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        train_on(
            cache,
            tmp_path / "t",
            architecture={"kind": "topk", "k": 3, "skip": True},
            kernel="compiled",
            optimiser="muon",
            auxiliary={"kind": "ghost"},
            bias_init="zeros",
            site=f"{hooks(0)}, blocks.7.mlp",
        )
    message = str(refused.value)
    for wanted in (
        "site: there is no site 'blocks.7.mlp'",
        "architecture: topk features have no threshold in use",
        "architecture.skip: a cross-layer transcoder has no skip path",
        "optimiser: muon would mix encoders of layers",
        "kernel: compiled is for transcoders of one layer",
        "auxiliary: ghost is for transcoders of one layer; use auxk",
        "bias_init: a cross-layer transcoder is trained with 'mean' only",
        "takes at least two layers; got 1",
    ):
        assert wanted in message, wanted
    assert not (tmp_path / "t").exists()


def test_sites_are_named_one_by_one_or_as_a_range(tmp_path: Path) -> None:
    names = {
        name.replace("blocks.", "layer").removesuffix(".mlp"): side for name, side in rows_of_layers(1, 128).items()
    }
    cache = publish_cache(tmp_path / "cache", {name: {"train": side} for name, side in names.items()})
    source = CacheSource(open_cache(cache), batch_rows=64, order_seed=0, device=torch.device("cpu"))
    for text in ("layer0-1", "layer0-layer1", "layer0, layer1"):
        with pytest.raises(SettingsError) as refused:  # these hooks name no layer, but both sites were found
            choose_sites(TrainSettings.read(SETTINGS, {"site": text}), source)
        assert "there is no" not in str(refused.value)
        assert str(refused.value).count("its hooks name no layer, or two") == 2
    with pytest.raises(SettingsError, match="there is no site 'layer2'"):
        choose_sites(TrainSettings.read(SETTINGS, {"site": "layer0-2"}), source)
    settings = TrainSettings.read(SETTINGS, {"cross_layer": False, "site": "layer0,layer1"})
    with pytest.raises(SettingsError, match="names several, which only --cross-layer takes"):
        train.run(settings, cache=cache, output=tmp_path / "t", compute=Compute(quiet=True))


def test_a_loader_of_one_layer_says_that_it_is_another_kind(trained: TrainResult) -> None:
    with pytest.raises(ArtifactMismatch, match="cross_layer_transcoder"):
        load_transcoder(trained.path)


def test_a_sweep_of_both_kinds_ends_with_what_each_run_makes_alone(
    cache: Path, trained: TrainResult, tmp_path: Path
) -> None:
    alone = TrainSettings.read(SETTINGS, {"cross_layer": False, "site": hooks(1), "snapshots": 1})
    runs = {"across": TrainSettings.read(SETTINGS, {"snapshots": 1}), "alone": alone}
    result = sweep.run(runs, cache=cache, output=tmp_path / "sweep", compute=Compute(quiet=True))
    assert [one.settings["site"] for one in result.runs] == [f"{hooks(0)},{hooks(1)}", hooks(1)]
    train.run(alone, cache=cache, output=tmp_path / "alone", compute=Compute(quiet=True))
    for name, path in (("across", trained.path), ("alone", tmp_path / "alone")):
        for file in ("weights.safetensors", "metrics.jsonl", "manifest.json"):
            swept = (tmp_path / "sweep" / "runs" / name / file).read_bytes()
            assert swept == (path / file).read_bytes(), f"{name}: {file}"


def test_a_run_starts_from_a_published_one_and_keeps_what_it_was(
    cache: Path, trained: TrainResult, tmp_path: Path
) -> None:
    same = TrainSettings.read(SETTINGS, {"steps": 1, "lr": 1e-9})
    result = train.run(same, cache=cache, output=tmp_path / "t", compute=Compute(quiet=True), start_from=trained.path)
    before, after = (load_cross_layer(path) for path in (trained.path, result.path))
    for name, value in before.state_dict().items():
        if name != "log_threshold":  # moves on with the first batch
            torch.testing.assert_close(after.state_dict()[name], value, atol=1e-4, rtol=1e-4, msg=name)
    assert result.metrics["heldout"]["fvu"] == pytest.approx(trained.metrics["heldout"]["fvu"], rel=0.02)
    digest = manifest_of(trained.path)["digest"]
    assert manifest_of(result.path)["inputs"]["transcoder"] == {"digest": digest}
    with pytest.raises(SettingsError) as refused:
        train.run(
            TrainSettings.read(SETTINGS, {"cross_layer": False, "site": hooks(1), "d_sae": 12}),
            cache=cache,
            output=tmp_path / "u",
            compute=Compute(quiet=True),
            start_from=trained.path,
        )
    for wanted in ("layers:", "has 2, this run 'one, by itself'", "d_sae:", "has 24, this run 12"):
        assert wanted in str(refused.value), wanted


def test_dead_features_are_resampled_from_rows_of_the_cache(cache: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "architecture": {"kind": "batch_topk", "k": 1},
        "d_sae": 96,
        "steps": 40,
        "resampling": {"kind": "anthropic", "resample_every": 20, "resample_window": 2, "resample_rows": 512},
        "auxiliary": {"kind": "auxk"},
        "dead_after_steps": 5,
        "max_norm_multiple": 10,
        "log_every": 40,
    }
    once, again = (train_on(cache, tmp_path / name, **few) for name in ("once", "again"))
    last = [json.loads(line) for line in (once.path / "metrics.jsonl").read_text().splitlines()][-3:]
    (logged,) = (line for line in last if line["split"] == "train")
    assert logged["resampled_features"] > 0
    assert logged["auxk"] > 0
    assert (once.path / "weights.safetensors").read_bytes() == (again.path / "weights.safetensors").read_bytes()


def test_the_command_trains_across_layers_and_refuses_what_is_for_one(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (cache, "--cross-layer", "--k", 2, "--d-sae", 12, "--steps", 3, "--batch-rows", 64)
    answer = command(capsys, "train", *common, "--out", tmp_path / "t")
    assert answer.code == 0, answer.err
    told = re.fullmatch(
        rf"{tmp_path / 't'}: 3 steps, held-out FVU of 2 layers ([\d.]+) to ([\d.]+), mean ([\d.]+); "
        r"L0 [\d.]+ a layer, dead features [\d.]+%",
        answer.out.splitlines()[0],
    )
    assert told is not None
    lowest, highest, mean = map(float, told.groups())
    layers = [layer["fvu"] for layer in manifest_of(tmp_path / "t")["layers"]]
    assert [lowest, highest, mean] == pytest.approx([min(layers), max(layers), sum(layers) / 2], abs=1e-4)
    assert command(capsys, "info", tmp_path / "t").code == 0
    swept = command(capsys, "train", *common, "--sweep", "lr=1e-3,1e-2", "--out", tmp_path / "s")
    assert swept.code == 0, swept.err
    assert swept.out.count("held-out FVU") == 2
