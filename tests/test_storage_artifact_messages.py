"""What is said of an artifact is a sentence, and tells a wrong input from a place that is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.artifact import Draft, read_manifest
from storage.errors import ArtifactMismatch, ArtifactMissing


def publish(path: Path) -> None:
    with Draft(path, "table", {}) as draft:
        draft.publish({}, [])


def every_file(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_kinds_of_artifacts_are_named_in_whole_sentences(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(ArtifactMismatch, match="holds a table, wanted an activation-cache; give the path of an act"):
        read_manifest(tmp_path / "a", "activation-cache")
    with pytest.raises(ArtifactMismatch, match="holds a table, wanted tables; give the path of tables"):
        read_manifest(tmp_path / "a", "tables")
    with pytest.raises(ArtifactMissing, match="there are no tables here; check the path, or make them first"):
        read_manifest(tmp_path / "nowhere", "tables")
    with Draft(tmp_path / "b", "tables", {"x": 1}):
        pass
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
