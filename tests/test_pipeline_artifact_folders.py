"""A folder that holds transcoders or tables of many layers, given as one path."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifact_folders import each_artifact
from storage.artifact import Draft


def publish(path: Path, kind: str) -> Path:
    with Draft(path, kind, {"name": path.name}) as draft:
        draft.publish({}, [])
    return path


def test_a_folder_stands_for_the_artifacts_of_that_kind_in_it_in_the_order_of_layers(tmp_path: Path) -> None:
    folder = publish(tmp_path / "transcoders", "transcoders")  # as circuits-model leaves it: an artifact itself
    layers = [publish(folder / f"layer{layer}", "transcoder") for layer in range(11)]
    publish(folder / "tables", "tables")
    (folder / "notes").mkdir()
    (folder / "layers.parquet").touch()
    assert each_artifact([folder], "transcoder") == layers
    assert each_artifact([layers[10], folder / "notes"], "transcoder") == [layers[10], folder / "notes"]
    assert each_artifact([folder], "tables") == [folder / "tables"]


def test_an_artifact_stands_for_itself_whatever_lies_inside_it(tmp_path: Path) -> None:
    outer = publish(tmp_path / "outer", "transcoder")
    publish(outer / "inner", "transcoder")
    assert each_artifact([outer, tmp_path / "gone"], "transcoder") == [outer, tmp_path / "gone"]
