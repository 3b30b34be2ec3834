"""Transcoders of every layer: the whole stage on a tiny model, interrupted, refused, and asked again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import cost as circuits_cost
from tailrace.pipeline.train import layer_set as circuits_model
from tailrace.pipeline.train.command_layer_set import command
from tailrace.pipeline.train.layer_set import fitting_together
from tailrace.pipeline.train.layer_set_scores import LAYERS
from tailrace.pipeline.train.run_set import train_drafts
from tailrace.pipeline.train.settings import CircuitsModelSettings
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import NonFiniteActivation, SettingsError, StorageFull
from tailrace.storage.tables import describe, read_schema
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.cache_jobs import differing, model_folder, text_file, tree

SETTINGS = CircuitsModelSettings(
    model=str(model_folder()),
    dataset=str(text_file()),
    tokens=400,
    context_length=16,
    holdout="1::4",
    d_sae=48,
    k=4,
    steps=12,
    batch_rows=64,
)


def run(output: Path, together: int | None = None, say: Any = lambda _: None) -> circuits_model.CircuitsModelResult:
    return circuits_model.run(
        SETTINGS, output=output, together=together, compute=Compute(threads=1, quiet=True), checkpoint_steps=5, say=say
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> circuits_model.CircuitsModelResult:
    return run(tmp_path_factory.mktemp("circuits") / "out")


def transcoder_files(result: circuits_model.CircuitsModelResult) -> dict[str, bytes]:
    return {name: data for name, data in tree(result.path).items() if not name.endswith("timing.jsonl")}


def test_every_layer_gets_a_transcoder_that_is_scored(made: circuits_model.CircuitsModelResult) -> None:
    assert [one.layer for one in made.layers] == [0, 1]
    assert [path.name for path in made.transcoders] == ["layer0", "layer1"]
    cache = open_cache(made.cache)
    assert cache.layout.sites[0].dtype == "bfloat16"
    for one, path in zip(made.layers, made.transcoders, strict=True):
        assert load_transcoder(path).d_sae == 48
        heldout = TranscoderManifest.read(path).metrics.heldout
        assert one.fvu == pytest.approx(heldout["fvu"], rel=1e-4)
        assert one.l0 == pytest.approx(heldout["l0"], rel=1e-4)
        assert one.n_rows == cache.split("heldout").n_rows
        assert one.n_ordinary <= one.n_rows


def test_the_set_verifies_and_its_table_explains_itself(made: circuits_model.CircuitsModelResult) -> None:
    assert verify_artifact(made.path, circuits_model.KIND) == []
    assert all(column.meaning for column in describe(read_schema(made.path / LAYERS)))


def test_time_and_disk_are_told_before_they_are_spent(made: circuits_model.CircuitsModelResult, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", say=lambda line: told.append(line) if "1/3" not in line else 1 // 0)
    assert told[0].startswith("cache: ")
    assert "for 400 rows of 2 sites" in told[0]
    assert told[1].startswith("training: ")
    assert told[2].endswith("B free")
    assert not (tmp_path / "out" / "circuits").exists()
    again: list[str] = []
    run(made.path.parent.parent, say=again.append)
    assert [line[:3] for line in again] == ["1/3", "2/3"]  # nothing is left to spend


@pytest.mark.parametrize("moment", ["between groups", "before the table"])
def test_interrupted_and_run_again_in_other_groups_it_ends_with_the_same_bytes(
    made: circuits_model.CircuitsModelResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    calls: list[int] = []

    def stop_after_first(*arguments: Any, **names: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train_drafts(*arguments, **names)

    def stop(*_arguments: Any, **_names: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "between groups":
            patch.setattr(circuits_model, "train_drafts", stop_after_first)
        else:
            patch.setattr(circuits_model, "score_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", together=1)
    assert not (tmp_path / "out" / "circuits" / "transcoders" / "manifest.json").exists()
    again = run(tmp_path / "out", together=2)
    assert differing(transcoder_files(again), transcoder_files(made)) == []


def test_a_layer_that_diverges_is_marked_and_the_others_are_published(
    made: circuits_model.CircuitsModelResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailrace.training.loop.run import TrainingRun

    state_tensors = TrainingRun.state_tensors

    def diverge(self: TrainingRun) -> Any:
        if self.name in diverging:
            raise NonFiniteActivation(f"{self.name}: the weights are not finite")
        return state_tensors(self)

    monkeypatch.setattr(TrainingRun, "state_tensors", diverge)
    diverging = {"layer0"}
    result = run(tmp_path / "one")
    assert [(one.status, one.fvu is None) for one in result.layers] == [("diverged", True), ("finished", False)]
    assert "diverged: layer0: the weights are not finite" in (result.layers[0].note or "")
    assert [path.name for path in result.transcoders] == ["layer1"]
    diverging = {"layer0", "layer1"}
    with pytest.raises(NonFiniteActivation, match="every layer's training diverged"):
        run(tmp_path / "both")


def test_a_disk_that_is_too_small_is_refused_with_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailrace.pipeline.cache import budget

    monkeypatch.setattr(budget, "_free_bytes", lambda _: 100_000)
    with pytest.raises(StorageFull, match=r"needs 0\.0 GB more .* and 0\.0 GB are free; free some space"):
        run(tmp_path / "out")
    assert not (tmp_path / "out" / "circuits").exists()
    many = SETTINGS.model_copy(update={"tokens": 100_000})
    plan = budget.plan_budget(many.caching(model_folder(), text_file()), output=tmp_path, compute=Compute(threads=1))
    row_bytes = 2 * 2 * 16 * 2 + 14  # two layers, two sides, 16 wide, two bytes; token, context, position, document
    assert plan.row_bytes["bfloat16"] == row_bytes
    cost = circuits_cost.TrainingCost(seconds=1, disk_bytes=500_000, kept_bytes=1)
    roomy = dataclasses.replace(plan, free_bytes=1_000_000)
    assert "use --tokens 3000, free some space" in str(circuits_cost.disk_problem(roomy, cost, tmp_path))
    assert circuits_cost.disk_problem(dataclasses.replace(plan, free_bytes=17_000_000), cost, tmp_path) is None


def test_wrong_settings_are_refused_before_anything_is_cached(tmp_path: Path) -> None:
    wrong = SETTINGS.model_copy(update={"k": 64})
    with pytest.raises(SettingsError, match="64 features per row cannot be chosen from d_sae = 48"):
        circuits_model.run(wrong, output=tmp_path / "out", compute=Compute(quiet=True))
    assert not (tmp_path / "out").exists()


def test_as_many_are_trained_together_as_memory_holds(made: circuits_model.CircuitsModelResult) -> None:
    cache = open_cache(made.cache)
    one = 16 * (16 + 16) * 48  # bytes of weights, gradients and moments
    assert [fitting_together(cache, 48, n_bytes) for n_bytes in (3 * one, 3 * one - 1, 1)] == [3, 2, 1]


def test_the_command_shows_a_line_for_every_layer(made: circuits_model.CircuitsModelResult) -> None:
    given = [
        item
        for name, value in SETTINGS.model_dump(exclude_unset=True).items()
        for item in (f"--{name.replace('_', '-')}", str(value))
    ]
    result = CliRunner().invoke(command, ["--out", str(made.path.parent.parent), *given, "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "FVU of ordinary rows" in result.output
    assert "layers.parquet: written, beside 2 transcoders" in result.output
    assert "to trace a circuit: pipeline circuit 'PROMPT' --logit ' TOKEN' --transcoders " in result.output
