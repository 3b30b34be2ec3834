"""A folder that holds transcoders or tables of many layers, given as one path."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tailrace.pipeline.artifacts.folders import each_artifact, refuse_folder, unfinished_inside
from tailrace.pipeline.dashboard import command_serve as serve
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch


def publish(path: Path, kind: str) -> Path:
    with Draft(path, kind, {"name": path.name}, inside=True) as draft:
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


def test_a_sweep_stands_for_its_finished_runs(tmp_path: Path) -> None:
    sweep = publish(tmp_path / "sweep", "sweep")
    runs = [publish(sweep / "runs" / f"k={k}", "transcoder") for k in (8, 16)]
    with Draft(sweep / "runs" / "k=32", "transcoder", {"name": "diverged"}, inside=True) as draft:
        (draft.path / "checkpoints").mkdir()
    assert each_artifact([sweep], "transcoder") == runs
    assert unfinished_inside(sweep) == [sweep / "runs" / "k=32"]


def test_where_one_is_wanted_a_folder_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    layers = [publish(tmp_path / "t" / f"layer{layer}", "tables") for layer in range(43)]
    named = ", ".join(f"layer{layer}" for layer in range(40))
    with pytest.raises(ArtifactMismatch) as caught:
        refuse_folder(tmp_path / "t", "tables")
    assert str(caught.value) == (
        f"{tmp_path / 't'}: holds tables in 43 folders, wanted those of one; give one of {named} and 3 more, as "
        f"{layers[0]}"
    )
    for kind, path in (("tables", layers[0]), ("dashboard", tmp_path / "t"), ("tables", tmp_path / "gone")):
        refuse_folder(path, kind)


def test_the_server_names_what_to_choose_from(tmp_path: Path) -> None:
    publish(tmp_path / "t" / "layer3", "dashboard")
    wanted = "holds dashboards in 1 folder, wanted those of one; give one of layer3, as"
    with pytest.raises(ArtifactMismatch, match=wanted):
        CliRunner().invoke(serve.command, [str(tmp_path / "t")], catch_exceptions=False)
