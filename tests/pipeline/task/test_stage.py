"""The stage ``pipeline task``: prompts in, tables and a printed summary out, everything wrong said at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Transcoded
from tailrace.analysis.task.answers import CorrectMinusIncorrect
from tailrace.analysis.task.curves import Task
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.task import stage as task
from tailrace.pipeline.task.command import command
from tailrace.pipeline.task.settings import TaskSettings
from tailrace.pipeline.task.tables import FEATURES, MODEL, NEURONS, TRANSCODER
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import SettingsError, TextError
from tailrace.storage.tables import describe, read_schema, read_table
from tests.support.spliced_models import mlp_site, publish_transcoder, random_transcoder, tiny_model

LINES: list[dict[str, Any]] = [
    {"prompt": "the time of the", "correct": ["man"], "incorrect": ["her", "of"]},
    {"prompt": "she was", "correct": ["not", "in"], "incorrect": ["they"]},
    {"prompt": "they have been there", "correct": ["when"], "incorrect": ["man"]},
]
SETTINGS = TaskSettings(kept=(0, 2, 24, 99), leave_out=3, prompts_per_batch=2)


def write_prompts(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def published(path: Path, site: str = "layer1") -> Path:
    sites = {f"layer{layer}": mlp_site(layer) for layer in range(3)}
    made_from = {"cache_id": "a", "generation": 0, "digest": "b"}
    made_of: Any = SimpleNamespace(
        reference=made_from, manifest=SimpleNamespace(model=tiny_model().identity()), sites=sites
    )
    return publish_transcoder(path, made_of, site, random_transcoder())


def model_folder() -> str:
    return str(tiny_model().bridge.cfg.model_name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> task.TaskResult:
    place = tmp_path_factory.mktemp("task")
    prompts = write_prompts(place / "prompts.jsonl", LINES)
    return task.run(
        SETTINGS,
        prompts=prompts,
        transcoders=[published(place / "transcoder")],
        output=place / "out",
        model=model_folder(),
        compute=Compute(quiet=True),
    )


def scores(result: task.TaskResult, kind: str) -> dict[int | None, list[float]]:
    return {one.n_kept: one.scores for one in result.curves if one.kind == kind}


def test_scores_are_those_of_runs_made_one_by_one(made: task.TaskResult) -> None:
    model = tiny_model()
    split = [model.tokenize([line["prompt"]])[0] for line in LINES]
    answers = {
        kind: [[model.tokenize([text])[0][0] for text in line[kind]] for line in LINES]
        for kind in ("correct", "incorrect")
    }
    prompts = pad_prompts([[model.bos_token_id, *ids] for ids in split])
    by_hand = Task(model.bridge, prompts, CorrectMinusIncorrect(**answers))
    assert scores(made, MODEL)[None] == pytest.approx(by_hand.scores().tolist(), abs=1e-6)
    whole = by_hand.scores({mlp_site(1): Transcoded(random_transcoder())}).tolist()
    assert scores(made, TRANSCODER)[None] == pytest.approx(whole, abs=1e-6)
    assert sorted(n for n in scores(made, FEATURES) if n is not None) == [0, 2, 24]  # 99 are more than there are
    assert scores(made, FEATURES)[24] == pytest.approx(whole, abs=1e-6)
    assert sorted(n for n in scores(made, NEURONS) if n is not None) == [0, 2, 24]


def test_the_ranking_is_by_variance_with_the_first_few_left_out(made: task.TaskResult) -> None:
    features = [one for one in made.ranking if one.kind == FEATURES]
    assert [one.rank for one in features] == list(range(24))
    assert [one.variance for one in features] == sorted((one.variance for one in features), reverse=True)
    assert [one.score_without is not None for one in features[:4]] == [True, True, True, False]
    assert len(features[0].answer_effects or []) == 7
    neurons = [one for one in made.ranking if one.kind == NEURONS]
    assert len(neurons) == 24
    assert neurons[0].answer_effects is None


def test_tables_explain_themselves_and_verify(made: task.TaskResult) -> None:
    assert verify_artifact(made.path, task.KIND) == []
    for name in ("prompts", "curves", "ranking"):
        assert all(column.meaning for column in describe(read_schema(made.path / f"{name}.parquet")))
    table = read_table(made.path / "prompts.parquet").to_pylist()
    assert [row["text"] for row in table] == [line["prompt"] for line in LINES]
    assert table[1]["token_ids"][0] == tiny_model().bos_token_id


def test_a_finished_task_is_returned_without_the_model(made: task.TaskResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "open_transcoder_model", None)
    place = made.path.parent
    for transcoder in (place / "transcoder", place):  # itself, and the folder that holds it
        again = task.run(SETTINGS, prompts=place / "prompts.jsonl", transcoders=[transcoder], output=made.path)
        assert again == made


def test_the_command_prints_curves_and_features(made: task.TaskResult) -> None:
    place = made.path.parent
    arguments = [str(place / "prompts.jsonl"), "--transcoders", str(place / "transcoder"), "--out", str(place / "cli")]
    result = CliRunner().invoke(command, [*arguments, "--model", model_folder(), "--kept", "1", "--leave-out", "1"])
    assert result.exit_code == 0, result.output
    assert "score of the model itself" in result.output
    assert "layer1, whole transcoder" in result.output
    assert "without it" in result.output


def refused(tmp_path: Path, lines: list[Any]) -> str:
    transcoder = tmp_path / "transcoder"
    if not transcoder.exists():
        published(transcoder)
    with pytest.raises(TextError) as caught:
        task.run(
            SETTINGS,
            prompts=write_prompts(tmp_path / "bad.jsonl", lines),
            transcoders=[transcoder],
            output=tmp_path / "out",
            model=model_folder(),
            compute=Compute(quiet=True),
        )
    assert not (tmp_path / "out").exists()  # nothing that would refuse the corrected prompts
    return str(caught.value)


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, ["{", {"prompt": "", "correct": [], "incorrect": ["a"], "note": 1}, {"prompt": "a"}])
    assert "line 1: is no JSON object" in message
    assert "line 2: has note, which mean nothing here" in message
    assert "line 2: prompt is '', wanted text" in message
    assert "line 2: correct is [], wanted a list of texts" in message
    assert "line 3: has no correct, incorrect" in message
    assert "is empty" in refused(tmp_path, [])


def test_answers_of_several_tokens_and_contradictions_are_named(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        [
            {"prompt": "the time", "correct": ["of the"], "incorrect": ["a"]},
            {"prompt": "the " * 80, "correct": ["of"], "incorrect": ["a"]},
        ],
    )
    assert "line 1: the correct answer 'of the' is 2 tokens, but must be one" in message
    assert "line 2: the prompt has 81 tokens, the model reads at most 64" in message
    contradiction = [{"prompt": "the time", "correct": ["of"], "incorrect": ["of"]}]
    assert "prompt 0: token" in refused(tmp_path, contradiction)


def test_two_transcoders_of_one_site_are_refused(tmp_path: Path) -> None:
    paths = [published(tmp_path / "one"), published(tmp_path / "two")]
    prompts = write_prompts(tmp_path / "prompts.jsonl", LINES)
    with pytest.raises(SettingsError, match="are both of site layer1; give one of them"):
        task.run(SETTINGS, prompts=prompts, transcoders=paths, output=tmp_path / "out")
    with pytest.raises(SettingsError, match="wanted numbers of features, none below 0"):
        TaskSettings.read({"kept": [-1]})


def test_scores_do_not_depend_on_the_batch(made: task.TaskResult) -> None:
    # prompts of a batch are padded to its longest
    place = made.path.parent
    alone = task.run(
        SETTINGS.model_copy(update={"prompts_per_batch": 1}),
        prompts=place / "prompts.jsonl",
        transcoders=[place / "transcoder"],
        output=place / "alone",
        model=model_folder(),
        compute=Compute(quiet=True),
    )
    for one, other in zip(alone.curves, made.curves, strict=True):
        torch.testing.assert_close(torch.tensor(one.scores), torch.tensor(other.scores), rtol=1e-4, atol=1e-6)


def test_numbers_to_keep_may_be_ranges() -> None:
    assert TaskSettings.read({"kept": ["0-3", "8,2"]}).kept == (0, 1, 2, 3, 8)
    assert TaskSettings.read({"kept": "5 - 6"}).kept == (5, 6)
    for wrong in ("3-1", "1-", "x", ""):
        with pytest.raises(SettingsError, match="write numbers and ranges such as 0-16,32,64"):
            TaskSettings.read({"kept": [wrong]})
