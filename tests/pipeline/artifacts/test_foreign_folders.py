"""A refused command leaves a folder that is not its own exactly as it was, and makes none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.blind.study import BlindStudy
from tailrace.pipeline.cache import stage
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.storage.artifact import REQUEST
from tailrace.storage.errors import ActionableError, ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.names import LOCK
from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import HERE, command, model_folder, run_cache, text_file
from tests.support.dashboard_tables import make_tables
from tests.support.tables_by_hand import example_row, feature_row, publish_tables

TRAINING = TrainSettings(architecture=TopK(k=3), site="layer0", d_sae=24, steps=2, batch_rows=32)
Snapshot = dict[str, tuple[int, bytes | None]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, a transcoder of it, and tables."""
    place = tmp_path_factory.mktemp("made")
    run_cache(place / "cache", tokens=100, layers="0-1")
    train.run(TRAINING, cache=place / "cache", output=place / "coder", compute=Compute(threads=1, quiet=True))
    make_tables(place / "tables", d_sae=8)
    for number in (1, 2):
        publish_tables(place / f"tables{number}", [feature_row(0, max=float(number))], [example_row(0)])
    return place


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """Somebody's folder, with names like those of temporary files, and a lock of another program."""
    place = tmp_path / "thesis"
    (place / "figures").mkdir(parents=True)
    for name in ("thesis.tex", ".notes.tmp-1", ".rows.tmp", ".rows.tmp123", "figures/.one.tmp-2", "figures/one.svg"):
        (place / name).write_text("precious")
    (place / LOCK).write_text("pid 17")
    return place


def snapshot(place: Path) -> Snapshot:
    """Return what lies in a folder: names, times of change, bytes."""
    return {
        str(path.relative_to(place)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, None)
        for path in place.rglob("*")
    }


RUN = ("train", "CACHE", "--site", "layer0", "--k", "3", "--d-sae", "24", "--steps", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "cache": (
        "cache",
        "--model",
        "MODEL",
        "--dataset",
        "TEXT",
        "--layers",
        "0",
        "--tokens",
        "100",
        "--context-length",
        "16",
    ),
    "train": RUN,
    "train --fresh": (*RUN, "--fresh"),
    "sweep": (*RUN, "--sweep", "lr=1e-3,1e-4"),
    "cross-layer": ("train", "CACHE", "--cross-layer", "--architecture", "relu", "--d-sae", "24", "--steps", "2"),
    "analyze": ("analyze", "PLACE/coder", "--cache", "CACHE", "--without-model"),
    "evaluate": ("evaluate", "PLACE/coder", "--cache", "CACHE"),
    "dashboard": ("dashboard", "PLACE/tables"),
    "export": ("export", "PLACE/coder", "--to", "sparsify"),
    "export tables": ("export", "PLACE/tables1", "--to", "circuit-tracer-features"),
    "circuit": (
        *("circuit", "the man", "--logit", "the", "--transcoders", "PLACE/coder", "--missing-layers", "opaque"),
        *("--model", "MODEL"),
    ),
    "blind draw": ("blind", "draw", "--tables", "PLACE/tables1", "--tables", "PLACE/tables2", "--n", "1"),
    "query": ("query", "SELECT 1", "--tables", "PLACE/tables"),
    "pareto": ("pareto", "PLACE/coder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_refused_command_leaves_a_foreign_folder_as_it_was(
    made: Path, thesis: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = snapshot(thesis)
    answer = command(capsys, *words(made, name), "--out", thesis)
    assert answer.code != 0, answer.out
    assert "thesis" in answer.err
    assert snapshot(thesis) == before


def words(made: Path, name: str) -> list[str]:
    """Return the words of a command, with the places they stand for."""
    places = {"MODEL": model_folder(), "TEXT": text_file(), "CACHE": made / "cache", "PLACE": made}
    found = list(COMMANDS[name])
    for word, place in places.items():
        found = [one.replace(word, str(place)) for one in found]
    return found


@pytest.mark.parametrize(
    "refused",
    [
        ("cache", "--layers", "7"),
        ("train", "--site", "layer7"),
        ("sweep", "--site", "layer7"),
        ("cross-layer", "--site", "layer7"),
        ("export", "--to", "saelens", "--module", "x"),
        ("dashboard", "--feature", "99"),
    ],
    ids=lambda refused: refused[0],
)
def test_a_command_with_wrong_settings_makes_no_folder(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: tuple[str, ...]
) -> None:
    name, *changes = refused
    assert command(capsys, *words(made, name), *changes, "--out", tmp_path / "new" / "place").code != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["query", "query parquet", "pareto"])
def test_an_answer_takes_the_place_of_no_pipe(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command_name, *more = name.split()
    os.mkfifo(tmp_path / "out.png")
    before = (tmp_path / "out.png").stat()
    formats = [word for one in more for word in ("--format", one)]
    answer = command(capsys, *words(made, command_name), *formats, "--out", tmp_path / "out.png")
    assert (answer.code, "out.png: is" in answer.err) == (1, True)
    assert os.path.samestat((tmp_path / "out.png").stat(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_refused_extension_leaves_a_cache_without_a_lock_as_it_was(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns(LOCK))
    before = snapshot(tmp_path)
    with pytest.raises(SettingsError, match="ask for more"):
        stage.extend(tmp_path / "cache", 50, **HERE)
    with pytest.raises(ActionableError):
        stage.widen(tmp_path / "cache", "7", (), **HERE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("request_text", ['{"url": "/users", "method": "GET"}', "[]", "no JSON"])
def test_fresh_throws_nothing_away_where_another_program_wrote_a_request(thesis: Path, request_text: str) -> None:
    (thesis / REQUEST).write_text(request_text)
    before = snapshot(thesis)
    with pytest.raises(ActionableError, match=REQUEST):
        train.discard_draft(thesis)
    assert snapshot(thesis) == before


def test_a_run_thrown_away_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        (tmp_path / "run" / "weights.safetensors").write_bytes(b"half")
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_drafts", stopped)
        with pytest.raises(ZeroDivisionError):
            train.run(TRAINING, cache=made / "cache", output=tmp_path / "run")
    assert (tmp_path / "run" / "weights.safetensors").exists()
    train.discard_draft(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("folder", ["", "snapshots", "runs/steps=40"])
def test_fresh_throws_no_file_of_the_user_away(made: Path, tmp_path: Path, folder: str) -> None:
    def interrupt(step: int, transcoder: Transcoder) -> None:
        raise KeyboardInterrupt

    output, is_sweep = tmp_path / "run", folder.startswith("runs")
    settings = TRAINING.model_copy(update={"steps": 40, "snapshots": 12, "keep_best": True, "evaluate_every": 2})
    arguments: dict[str, Any] = {"cache": made / "cache", "output": output, "checkpoint_steps": 4}
    begin = partial(sweep.run, {"steps=40": settings}) if is_sweep else partial(train.run, settings)
    for fresh in (False, True):  # what a run writes itself is in no flag's way
        with pytest.raises(KeyboardInterrupt):
            begin(**arguments, hooks=[(10, interrupt)], fresh=fresh)
    notes = output / folder / "notes.txt"
    notes.write_text("weeks of thought")
    before = snapshot(output)
    with pytest.raises(ArtifactMismatch, match=f"no part of a run: {notes.relative_to(output)}. Nothing was deleted"):
        train.discard_draft(output)
    assert snapshot(output) == before
    notes.unlink()
    train.discard_draft(output)
    assert list(output.iterdir()) == []


STUDY: dict[str, Callable[[BlindStudy], object]] = {
    "note": lambda study: study.note("a remark"),
    "hypothesis": lambda study: study.hypothesise("semicolons"),
    "reveal": lambda study: study.reveal(),
    "verdict": lambda study: study.conclude("right"),
    "add": lambda study: study.add("paths", [1], source="weights"),
}


@pytest.mark.parametrize("act", STUDY)
def test_a_study_that_was_not_begun_leaves_no_ledger(thesis: Path, act: str) -> None:
    before = snapshot(thesis)
    for place in (thesis, thesis.with_name("nowhere")):
        with pytest.raises(ArtifactMissing, match="blind study begin` starts one"):
            STUDY[act](BlindStudy(place))
    assert snapshot(thesis.parent) == {"thesis": (0, None), **{f"thesis/{name}": of for name, of in before.items()}}
