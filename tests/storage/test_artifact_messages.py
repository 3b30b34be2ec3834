"""What is said of an artifact is a sentence, and tells a wrong input from a place that is taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tailrace.storage.artifact import Manifest, read_bytes
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactCorrupt, ArtifactIncomplete, ArtifactMismatch, ArtifactMissing, StorageFull
from tailrace.training.loop.run_log import JsonLines


def publish(path: Path) -> None:
    with Draft(path, "table", {}) as draft:
        draft.publish({}, [])


def every_file(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_kinds_of_artifacts_are_named_in_whole_sentences(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(ArtifactMismatch, match="holds a table, wanted an activation-cache; give the path of an act"):
        Manifest.read(tmp_path / "a", "activation-cache")
    with pytest.raises(ArtifactMismatch, match="holds a table, wanted tables; give the path of tables"):
        Manifest.read(tmp_path / "a", "tables")
    with pytest.raises(ArtifactMissing, match="there are no tables here; check the path, or make them first"):
        Manifest.read(tmp_path / "nowhere", "tables")
    with Draft(tmp_path / "b", "tables", {"x": 1}):
        pass
    with pytest.raises(ArtifactIncomplete, match="these tables were never finished; run the command that makes them"):
        Manifest.read(tmp_path / "b", "tables")
    with pytest.raises(
        ArtifactMismatch, match="b: unfinished tables with other settings lie here; use the same settings"
    ):
        Draft(tmp_path / "b", "tables", {"x": 2})


def test_a_place_taken_by_another_kind_of_artifact_is_left_alone_and_said_so(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    before = {path: path.read_bytes() for path in every_file(tmp_path)}
    with pytest.raises(ArtifactMismatch, match="a: holds a table already; choose another path for the transcoder"):
        Draft(tmp_path / "a", "transcoder", {})
    assert {path: path.read_bytes() for path in every_file(tmp_path)} == before


def test_a_part_that_only_one_side_has_is_named_without_all_it_holds(tmp_path: Path) -> None:
    """Such as a run that another grid of a sweep does not have, with its forty settings."""
    one, two, other = ({"runs": {name: {"settings": {"lr": 0.1}}}} for name in ("k=1", "k=1", "k=2"))
    with Draft(tmp_path / "a", "sweep", one):
        pass
    with Draft(tmp_path / "a", "sweep", two):
        pass
    with pytest.raises(ArtifactMismatch) as caught:
        Draft(tmp_path / "a", "sweep", other)
    assert str(caught.value).splitlines()[1:] == [
        "  runs.k=1: is there, not asked for",
        "  runs.k=2: is not there, asked for",
    ]


def test_too_many_open_files_are_no_fault_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # injected: the system's answer
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    publish(tmp_path / "a")
    (tmp_path / "log").write_text("")
    limit = "raise the limit of open files .ulimit -n. or do less at once"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ArtifactCorrupt, match=rf"cannot be read \(Too many open files\); {limit}$"):
            Manifest.read(tmp_path / "a", "table")
        with pytest.raises(StorageFull, match=rf"kept: {limit}, then run the same command again"):
            JsonLines(tmp_path / "log")


def test_a_link_that_leads_in_a_circle_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("log")
    with pytest.raises(StorageFull, match="a link there leads in a circle, or is none that may be followed; replace"):
        JsonLines(tmp_path / "log")
    with pytest.raises(ArtifactCorrupt, match="a link there leads in a circle, or is none that may be followed; repl"):
        read_bytes(tmp_path / "log")
