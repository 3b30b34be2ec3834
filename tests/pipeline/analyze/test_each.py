"""``pipeline analyze`` of many transcoders: ordinary tables of each, one model, every problem told first."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tailrace.pipeline.analyze import many as analyze_each
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.command import command
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import AnalyzeResult
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, Manifest
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ActionableError, ArtifactMismatch, NonFiniteActivation, SettingsError
from tests.support.cache_jobs import CONTEXT_LENGTH, model_folder, run_cache, text_file
from tests.support.spliced_models import publish_transcoder, random_transcoder

SETTINGS = AnalyzeSettings(examples=2, rows=50)
FLAGS = ("--examples", "2", "--rows", "50", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two layers, a folder with transcoders of both, and the tables of each made alone."""
    place = tmp_path_factory.mktemp("each")
    run_cache(place / "cache", layers="all")
    cache = open_cache(place / "cache")
    for layer in (0, 1):
        path = place / "set" / f"layer{layer}"
        publish_transcoder(path, cache, f"layer{layer}", random_transcoder(seed=layer))
        analyze.run(
            SETTINGS,
            transcoder=path,
            cache=place / "cache",
            output=place / "alone" / path.name,
            compute=Compute(threads=1, quiet=True),
        )
    return place


def transcoders(made: Path) -> list[Path]:
    return [made / "set" / "layer0", made / "set" / "layer1"]


def run(made: Path, output: Path, paths: list[Path] | None = None, **arguments: Any) -> list[AnalyzeResult]:
    settings = arguments.pop("settings", SETTINGS)
    given: dict[str, Any] = {"cache": made / "cache", "compute": Compute(threads=1, quiet=True), **arguments}
    return analyze_each.run(settings, transcoders=paths or transcoders(made), output=output, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count_calls(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> list[str]:
    """Return a list that gets an entry whenever a module calls its function of that name."""
    calls: list[str] = []
    function = pkgutil.resolve_name(f"{module}:{name}")

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*arguments, **named)

    monkeypatch.setattr(f"{module}.{name}", counted)
    return calls


@pytest.mark.slow
def test_each_gets_the_tables_it_would_get_alone_from_a_model_that_is_opened_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_calls(monkeypatch, "tailrace.pipeline.analyze.sources", "open_recorded_model")
    told: list[Path] = []
    heard: list[str] = []
    results = run(made, tmp_path / "t", finished=lambda one: told.append(one.path), announce=heard.append)
    assert files(tmp_path / "t") == files(made / "alone")
    assert [one.path for one in results] == told == [tmp_path / "t" / "layer0", tmp_path / "t" / "layer1"]
    assert len(opened) == 1
    assert len(heard) == 1
    assert heard[0].endswith("sorted; and about as much for the other")


def test_finished_ones_are_not_made_again_and_need_no_model(made: Path, tmp_path: Path) -> None:
    def stop(result: AnalyzeResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "t", finished=stop)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["layer0"]
    before = (tmp_path / "t" / "layer0" / "features.parquet").stat().st_mtime_ns
    run(made, tmp_path / "t")
    assert (tmp_path / "t" / "layer0" / "features.parquet").stat().st_mtime_ns == before
    assert files(tmp_path / "t") == files(made / "alone")
    assert len(run(made, tmp_path / "t", model="/nowhere")) == 2


def test_every_problem_is_told_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    site = {"site": {"name": "layer7", "hook_in": "a", "hook_out": "b", "d_in": 16, "d_out": 16, "dtype": "float32"}}
    strangers = [
        publish_transcoder(tmp_path / "stranger", cache, "layer0", random_transcoder(), site),
        publish_transcoder(tmp_path / "other", cache, "layer1", random_transcoder(), {"model": {"name": "another"}}),
    ]
    analyze.run(
        SETTINGS.model_copy(update={"examples": 3}),
        transcoder=made / "set" / "layer1",
        cache=made / "cache",
        output=tmp_path / "t" / "layer1",
        compute=Compute(quiet=True),
    )
    with pytest.raises(ArtifactMismatch) as caught:
        run(made, tmp_path / "t", [*transcoders(made), *strangers])
    message = str(caught.value)
    assert f"has no site 'layer7', which {strangers[0]} was trained on; it has layer0, layer1" in message
    assert f"{strangers[1]} was not trained on what" in message
    assert "settings.examples: there it is 3, asked for 2" in message
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["layer1"]


def test_problems_of_several_classes_are_one_error(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ActionableError, match=r"cache: [\s\S]*gone: there is no transcoder here"):
        run(made, tmp_path / "t", [made / "cache", tmp_path / "gone"])


def test_tables_of_one_name_and_an_artifact_at_the_place_are_refused(made: Path, tmp_path: Path) -> None:
    again = made / "set" / ".." / "set" / "layer0"
    with pytest.raises(SettingsError, match=r"some of these are the same[\s\S]*t/layer0: .*layer0, .*layer0"):
        run(made, tmp_path / "t", [*transcoders(made), again])
    with pytest.raises(ArtifactMismatch, match="--out is a folder that gets tables of each"):
        run(made, made / "alone" / "layer0")
    with pytest.raises(SettingsError, match="no transcoder given"):
        analyze_each.run(SETTINGS, transcoders=[], output=tmp_path / "t", cache=made / "cache")


def test_one_that_is_not_finite_does_not_keep_the_others_from_theirs(made: Path, tmp_path: Path) -> None:
    broken = random_transcoder()
    with torch.no_grad():
        broken.b_enc[3] = torch.nan
    path = publish_transcoder(tmp_path / "broken", open_cache(made / "cache"), "layer0", broken)
    with pytest.raises(NonFiniteActivation, match=f"^{path}: "):
        run(made, tmp_path / "t", [path, made / "set" / "layer1"])
    assert files(tmp_path / "t" / "layer1") == files(made / "alone" / "layer1")
    assert not (tmp_path / "t" / "broken" / MANIFEST).exists()


def test_transcoders_that_read_earlier_than_some_are_told_before_anything_is_made(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"set/layer1: --downstream .*layer1: .* reads before"):
        run(made, tmp_path / "t", downstream=[made / "set" / "layer1"])
    assert not (tmp_path / "t").exists()
    run(made, tmp_path / "t", transcoders(made)[:1], downstream=[made / "set" / "layer1"])
    assert Manifest.read(tmp_path / "t" / "layer0", "tables").as_json()["inputs"]["downstream"].keys() == {"layer1"}


@pytest.mark.slow
def test_fresh_text_is_read_with_one_model_for_all(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FreshText.read({"dataset": str(text_file()), "context_length": CONTEXT_LENGTH, "contexts_per_batch": 4}, {})
    fresh: dict[str, Any] = {"cache": None, "live": text, "model": str(model_folder())}
    opened = count_calls(monkeypatch, "tailrace.pipeline.analyze.stage", "open_transcoder_model")
    run(made, tmp_path / "t", **fresh)
    assert len(opened) == 1
    alone = tmp_path / "alone" / "layer1"
    analyze.run(
        SETTINGS, transcoder=made / "set" / "layer1", output=alone, compute=Compute(threads=1, quiet=True), **fresh
    )
    assert files(tmp_path / "t" / "layer1") == files(alone)


def invoke(made: Path, output: Path, *paths: Path) -> tuple[list[str], str]:
    """Return what the command says on standard output, in lines, and on standard error."""
    arguments = [*map(str, paths), "--cache", str(made / "cache"), "--out", str(output), *FLAGS]
    said = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert said.exit_code == 0
    return said.stdout.splitlines(), said.stderr


@pytest.mark.slow
def test_the_command_takes_one_a_folder_or_several(made: Path, tmp_path: Path) -> None:
    with Draft(made / "set" / "layer2", "transcoder", {"never": "finished"}) as draft:
        (draft.path / "weights").touch()
    lines, beside = invoke(made, tmp_path / "folder", made / "set")
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "folder" / f"layer{n}") for n in (0, 1)]
    assert "left out, as never finished: layer2" in beside
    invoke(made, tmp_path / "several", *transcoders(made))
    assert files(tmp_path / "folder") == files(tmp_path / "several") == files(made / "alone")
    lines, beside = invoke(made, tmp_path / "one", made / "set" / "layer1")
    assert lines[0].startswith(f"{tmp_path / 'one'}: 24 features over 45 rows of 60 (contexts drawn uniformly)")
    assert files(tmp_path / "one") == files(made / "alone" / "layer1")


def test_a_folder_with_one_transcoder_is_a_folder(made: Path, tmp_path: Path) -> None:
    publish_transcoder(tmp_path / "set" / "only", open_cache(made / "cache"), "layer1", random_transcoder(seed=1))
    lines, _ = invoke(made, tmp_path / "t", tmp_path / "set")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["only"]
    assert len(lines) == 1
