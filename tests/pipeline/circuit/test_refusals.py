"""``pipeline circuit``: what is refused, and what is warned of, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question, parse_feature, prompt_tokens
from tailrace.pipeline.train.layer_set_scores import LAYERS, write_layers
from tailrace.storage.errors import SettingsError
from tests.pipeline.circuit.test_stage import write_dashboard, write_tables
from tests.support.circuit_places import PROMPT, SMALL, Place, given, run_command
from tests.support.layer_outcomes import layer_outcome
from tests.support.tiny_models import BOS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("circuits"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--feature", "2:24"], "feature 2:24: this transcoder has features 0 to 23"),
        (["--feature", "2-24"], "feature '2-24': write LAYER:INDEX, such as 8:89"),
        (["--feature", "2:1", "--token", 11], "token 11: the prompt has 11 tokens, 0 to 10"),
        (["--feature", "2:1", "--token", 0], "token 0: transcoders do not stand in there"),
        (["--logit", "her him"], "logit 'her him': is 2 tokens to this model ('her' 'him'), wanted one"),
        (["--feature", "2:1", "--logit", "her"], "--feature and --logit is given; use one of"),
        ([], "none is given; use one of --feature LAYER:INDEX, --logit TEXT and --logit-difference"),
        (["--logit-difference", "her", "her"], "--logit-difference: both are 'her', so there is nothing to explain"),
        (["--logit", "her", "--direction", "decoder"], "--direction decoder: only with --feature"),
        (["--logit", "her", "--filter", "token~2"], "filter 'token~2': write a field, a comparator and a value"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], complaint: str
) -> None:
    said = run_command(place, capsys, PROMPT, *arguments, *given(place), "--out", tmp_path / "c", fails=True)
    assert complaint in said
    assert "Traceback" not in said


def test_a_dashboard_of_other_features_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = write_tables(tmp_path / "tables", place.transcoders[2])
    other = write_tables(tmp_path / "other", place.transcoders[2])
    asked = [PROMPT, "--logit", "her", *given(place), "--tables", tables, "--out", tmp_path / "c", "--dashboard"]
    elsewhere = write_dashboard(tmp_path / "elsewhere", tables, name="layer7")
    said = run_command(place, capsys, *asked, elsewhere, fails=True)
    assert "shows none of layer0, layer1, layer2; give the one of these transcoders" in said
    assert not (tmp_path / "c").exists()
    said = run_command(place, capsys, *asked, write_dashboard(tmp_path / "theirs", other), fails=True)
    assert "was made of other tables of layer2 than given" in said


def test_a_prompt_of_the_bos_alone_is_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("", BOS):
        said = run_command(place, capsys, prompt, "--logit", "her", *given(place), "--out", tmp_path / "c", fails=True)
        assert "has no token but the BOS" in said


def test_missing_layers_are_refused_unless_they_may_be_opaque(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--transcoders", place.transcoders[1], "--transcoders", place.transcoders[2]]
    said = run_command(place, capsys, PROMPT, "--logit", "her", *two, "--out", tmp_path / "a", fails=True)
    assert "layers 0: no transcoder of them was given" in said
    assert "--missing-layers opaque" in said
    said = run_command(place, capsys, PROMPT, "--feature", "0:3", *two, "--out", tmp_path / "b", fails=True)
    assert "--feature 0:3: no transcoder of layer 0 was given; layers with one: 1, 2" in said
    assert "layers " not in said.replace("layers with one", "")  # none is below layer 0
    opaque = ["--missing-layers", "opaque", "--max-features", 10, "--order", "magnitude"]
    run_command(place, capsys, PROMPT, "--logit", "her", *two, "--out", tmp_path / "c", *opaque)
    root = json.loads((tmp_path / "c" / "circuit.json").read_text())["root"]
    assert root["incompleteness"] < 1e-5
    assert root["by_kind"]["mlp"] != 0


@pytest.mark.parametrize(
    ("feature", "told"),
    [
        ("2:24", ["--feature 2:24: this transcoder has features 0 to 23", "layers 0, 1: no transcoder of them"]),
        ("1:3", ["--feature 1:3: no transcoder of layer 1 was given; layers with one: 2", "layers 0: no transcoder"]),
        ("9:3", ["--feature 9:3: no transcoder of layer 9 was given", "layers 0, 1: no transcoder of them"]),
    ],
)
def test_a_feature_that_is_not_there_is_told_with_all_else_before_a_model_is_loaded(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feature: str, told: list[str]
) -> None:
    monkeypatch.setattr(circuit, "open_transcoder_model", lambda *_, **__: pytest.fail("the model was opened"))
    with pytest.raises(SettingsError) as error:
        circuit.run(
            SMALL, Question(PROMPT, feature=parse_feature(feature)), transcoders=place.transcoders[2:],
            output=tmp_path / "c", model=str(place.model_path),
        )  # fmt: skip
    lines = str(error.value).splitlines()
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))
    assert not (tmp_path / "c").exists()


def test_transcoders_of_other_models_processings_sites_and_twice_of_one_layer_are_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processed = place.publish("processed", 1, {"processing": "compatibility"})
    stream = place.publish("stream", 1, None, hook_in="blocks.1.hook_resid_pre")
    across = place.publish("across", 1, None, hook_in="blocks.0.mlp.hook_in")
    first, _, last = place.transcoders

    def refused(*transcoders: Path) -> str:
        options = [part for path in transcoders for part in ("--transcoders", path)]
        return run_command(place, capsys, PROMPT, "--logit", "her", *options, "--out", tmp_path / "c", fails=True)

    assert "processing: there it is 'raw', asked for 'compatibility'" in refused(first, processed, last)
    assert "does not hold the input and output of one MLP" in refused(first, stream, last)
    assert "circuits need transcoders of one layer's MLP" in refused(first, across, last)
    assert "are both of layer 2; give one of them" in refused(*place.transcoders, place.publish("again", 2))


def test_a_prompt_longer_than_the_models_context_is_refused(place: Place) -> None:
    with pytest.raises(SettingsError, match="has 101 tokens with the BOS, the model's longest context is 64"):
        prompt_tokens(place.model, "the man " * 50)


def test_a_layer_that_explains_next_to_nothing_is_told_by_the_stage(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_layers(place.folder / LAYERS, [layer_outcome(layer, 0.2, 1.5) for layer in range(3)])
    try:
        circuit.run(
            SMALL, Question(PROMPT, feature=(2, 3)), transcoders=place.transcoders, output=tmp_path / "c",
            model=str(place.model_path),
        )  # fmt: skip
    finally:
        (place.folder / LAYERS).unlink()
    (told,) = [record.getMessage() for record in caplog.records if "FVU above" in record.getMessage()]
    assert "layer 0 (1.5 on ordinary rows), layer 1 (1.5 on ordinary rows); what" in told
