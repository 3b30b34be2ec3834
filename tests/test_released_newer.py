"""What a newer version wrote is refused with both versions named, whatever it is and whoever opens it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.blind.ledger import Ledger
from tailrace.pipeline.blind.study import LEDGER, BlindStudy
from tailrace.pipeline.cli import main
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, REQUEST, Manifest, canonical_json, read_json, seal
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.formats import ARTIFACT_FORMATS
from tests.released.values import artifacts, served_rows

RELEASED = Path(__file__).parent / "released" / "d14043a"
EXAMPLES = {kind: name for name, kind in sorted(artifacts(RELEASED).items(), reverse=True)}
"""An artifact of each kind."""
OPENED_BY = {
    "activation-cache": ["train {} --site layer0 --out new", "extend {} --tokens 999", "shuffle {}"],
    "transcoder": ["analyze {} --cache caches/float32 --out new", "score text --transcoders {}"],
    "cross_layer_transcoder": [
        "evaluate {} --cache caches/float32 --out new",
        "export {} --to circuit-tracer --out new",
    ],
    "tables": ["query 'SELECT 1' --tables {}", "dashboard {} --out new", "serve {}"],
    "sweep": ["query 'SELECT 1' --tables {}", "pareto {}"],
    "evaluation": ["query 'SELECT 1' --tables {}", "pareto {}"],
    "dashboard": ["serve {}"],
    "blind-comparison": ["blind tally {}"],
}
"""Commands that take an artifact of a kind, beside ``info`` and ``verify``, which take all."""


def make_newer(path: Path, **changes: Any) -> int:
    """Write an artifact's manifests as a later version would; return the format they have now."""
    for file in path.glob("manifest*.json"):
        manifest = read_json(file)
        del manifest["digest"]
        newer = ARTIFACT_FORMATS[manifest["kind"]] + 1
        key = "format_version" if manifest["kind"] == "activation-cache" else "format"
        file.write_bytes(seal({**manifest, key: newer, **changes}))
    return newer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(RELEASED / "caches/float32", tmp_path / "caches/float32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copied(kind: str, place: Path) -> Path:
    return Path(shutil.copytree(RELEASED / EXAMPLES[kind], place / "newer"))


def refusal(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 1, line
    return capsys.readouterr().err


def test_there_is_an_example_of_every_kind() -> None:
    assert EXAMPLES.keys() | {"blind-study"} == ARTIFACT_FORMATS.keys()


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_a_newer_artifact_is_refused_with_both_versions(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(kind, place)
    newer = make_newer(path, versions={"tailrace": "7.8.9"})
    with pytest.raises(ArtifactMismatch) as refused:
        Manifest.read(path, kind)
    told = str(refused.value)
    assert told.startswith(f"{path}: ")
    assert f"format {newer} of {kind}, which tailrace 7.8.9 wrote" in told
    assert f"reads formats up to {newer - 1}; upgrade tailrace" in told
    for line in ["info {}", "verify {}", *OPENED_BY.get(kind, [])]:
        said = refusal(line.format("newer"), capsys)
        assert said.count(f"format {newer} of {kind}") == 1, line
    assert not (place / "new" / MANIFEST).exists()


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_a_newer_draft_is_not_gone_on_with(tmp_path: Path, kind: str) -> None:
    newer = ARTIFACT_FORMATS[kind] + 1
    (tmp_path / REQUEST).write_bytes(canonical_json({"format": newer, "seed": 1}))
    with pytest.raises(ArtifactMismatch, match=f"format {newer} of {kind}, which a newer version wrote"):
        Draft(tmp_path, kind, {"seed": 1})


def test_an_older_generation_in_a_newer_format_is_refused(place: Path) -> None:
    path = Path(shutil.copytree(RELEASED / "caches/grown", place / "newer"))
    newest = (path / MANIFEST).read_bytes()
    make_newer(path)
    (path / MANIFEST).write_bytes(newest)
    assert open_cache(path).generation > 0
    with pytest.raises(ArtifactMismatch, match="format 2 of activation-cache"):
        open_cache(path, 0)


def test_a_newer_epoch_is_not_served(place: Path) -> None:
    path = Path(shutil.copytree(RELEASED / "caches/grown", place / "newer"))
    (epoch,) = (path / "epochs").iterdir()
    make_newer(epoch)
    with pytest.raises(ArtifactMismatch, match="format 2 of shuffled-epoch"):
        served_rows(open_cache(path).split("train"), 3)


def test_a_newer_study_is_refused_and_nothing_is_added(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / LEDGER)
    ledger.append("begin", begins=True, subject={}, mode="blind", format=2)
    before = ledger.path.read_bytes()
    study = BlindStudy(tmp_path)
    for act in (study.entries, lambda: study.note("seen"), study.evidence):
        with pytest.raises(ArtifactMismatch, match="format 2 of blind-study"):
            act()
    assert ledger.path.read_bytes() == before


def test_what_says_nothing_of_its_format_has_the_first(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(seal({"kind": "shuffled-epoch", "request": {}, "files": {}}))
    assert "format" not in Manifest.read(tmp_path, "shuffled-epoch").as_json()
