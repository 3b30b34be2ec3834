"""Artifacts as earlier releases wrote them are verified, read, used and, where unfinished, finished by this one.

``tests/released`` holds them with the recipe that made them. Numbers that lie in files must be equal to the bit;
those that are computed anew may differ as those of another machine do.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.dashboard import serve
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.query import stage as query
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, read_json
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.training.architectures.manifest import TranscoderManifest
from tests.released.recipe import STEPS, Step
from tests.released.runner import run
from tests.released.values import MANIFESTS, VALUES, Values, artifacts, comparable, is_inside, read_values

RELEASES = sorted(path.parent for path in Path(__file__).parent.glob(f"released/*/{VALUES}"))
ROUNDING = 1e-3
"""Relative difference allowed between numbers that two machines compute: a few last bits, after a dozen steps."""
ARTIFACTS = {release.name: artifacts(release) for release in RELEASES}
"""The kind of each published artifact, by release and path."""
PUBLISHED = [(release, name) for release, kinds in ARTIFACTS.items() for name in kinds]
CACHES = [(release, name) for release, name in PUBLISHED if name.startswith("caches/") and name.count("/") == 1]
KILLED = [step for step in STEPS if step.kill is not None]


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of every release's folder: whatever opens an artifact may write beside it."""
    place = tmp_path_factory.mktemp("released")
    for release in RELEASES:
        shutil.copytree(release, place / release.name)
    return place


@pytest.fixture(params=[release.name for release in RELEASES])
def place(request: pytest.FixtureRequest, released: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release's folder, to which its paths are relative; the working directory."""
    monkeypatch.chdir(released / request.param)
    return released / str(request.param)


def pipeline(*lines: str) -> None:
    for line in lines:
        run(Step("", line), Path.cwd())


def recorded(release: Path, part: str) -> dict[str, Values]:
    values: dict[str, Values] = json.loads((release / VALUES).read_text())[part]
    return values


def close(found: Any, expected: Any) -> Any:
    return found == pytest.approx(expected, rel=ROUNDING, abs=1e-6)


def step(output: str) -> str:
    """Return the command line that made an artifact."""
    (line,) = [one.line for one in STEPS if one.output == output]
    return line


def again(output: str) -> Path:
    """Run the command line that made an artifact for another place; return that."""
    target = Path("again") / output
    pipeline(step(output).format(out=target))
    return target


def test_there_is_a_release(place: Path) -> None:
    assert sorted(recorded(place, "published")) == sorted(ARTIFACTS[place.name])


@pytest.mark.parametrize(("release", "name"), PUBLISHED)
def test_an_artifact_is_read_as_the_release_that_wrote_it_did(released: Path, release: str, name: str) -> None:
    expected = recorded(released / release, "published")[name]
    found = json.loads(json.dumps(read_values(released / release / name)))
    assert found["order"] == expected["order"]
    assert found["stored"] == expected["stored"]
    assert close(found["numbers"], expected["numbers"])


@pytest.mark.parametrize(("release", "name"), PUBLISHED)
def test_a_manifest_says_nothing_that_this_version_does_not_know(
    released: Path, release: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = MANIFESTS[ARTIFACTS[release][name]]
    assert manifest.read(released / release / name).as_json() == read_json(released / release / name / MANIFEST)
    assert caplog.messages == []


def test_every_kind_has_a_manifest() -> None:
    assert MANIFESTS.keys() | {"blind-study"} == ARTIFACT_FORMATS.keys()  # a study is a ledger


def test_every_byte_is_verified_and_every_artifact_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # an epoch is verified with its cache
    names = [name for name, kind in ARTIFACTS[place.name].items() if kind != "shuffled-epoch"]
    for name in names:
        pipeline(f"verify '{name}' --pairs 0", f"info '{name}'")
    assert capsys.readouterr().out.count("verified") == len(names)


def test_rows_are_those_of_the_model_run_again(place: Path) -> None:
    pipeline("verify caches/grown --pairs 2 --shuffle --batch-rows 8")


@pytest.mark.parametrize(("release", "name"), CACHES)
def test_a_transcoder_is_trained_from_a_cache(
    released: Path, release: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(released / release)
    site = list(open_cache(name).sites)[-1]
    out = f"again/of/{name}"
    pipeline(f"train {name} --site '{site}' --k 2 --d-sae 8 --batch-rows 16 --steps 2 --quiet --out {out}")
    manifest = TranscoderManifest.read(Path(out))
    assert manifest.as_json()["inputs"]["cache"] == open_cache(name).reference
    assert np.isfinite(manifest.metrics.train["fvu"])


def test_training_learns_what_it_learnt(place: Path) -> None:
    made = again("transcoders/topk")
    before, after = (load_file(path / "weights.safetensors") for path in (Path("transcoders/topk"), made))
    assert {name: one.shape for name, one in after.items()} == {name: one.shape for name, one in before.items()}
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=ROUNDING, atol=1e-3, err_msg=name)


def test_a_transcoder_is_the_start_of_another(place: Path) -> None:
    pipeline(
        "train caches/float32 --site layer1 --architecture topk --k 4 --d-sae 16 --batch-rows 32 --steps 2 --quiet "
        "--from transcoders/topk --out again/from"
    )
    assert TranscoderManifest.read(Path("again/from")).metrics.steps == 2


def test_tables_are_made_again_and_asked(place: Path) -> None:
    made = again("tables/relu")
    ask = "SELECT feature, n_active, frequency, max FROM features ORDER BY feature"
    before, after = (query.run(ask, tables=tables, format="json") for tables in (Path("tables/relu"), made))
    for expected, found in zip(json.loads(str(before)), json.loads(str(after)), strict=True):
        assert close(found, expected)
    pipeline("query --saved examples --set feature=1 --tables tables/topk")


def test_a_circuit_is_traced_through_transcoders(place: Path) -> None:
    made = circuit.read_result(again("circuits/logit")).document
    expected = circuit.read_result(Path("circuits/logit")).document
    assert made["tokens"] == expected["tokens"]
    assert close(made["root"]["value"], expected["root"]["value"])


@pytest.mark.parametrize("name", ["layers", "cross-layer"])
def test_transcoders_are_evaluated_in_the_model(place: Path, name: str) -> None:
    made, before = again(f"evaluations/{name}"), Path(f"evaluations/{name}")
    scores, expected = evaluate.read_result(made).scores, evaluate.read_result(before).scores
    assert list(scores) == list(expected)
    for one, score in expected.items():
        assert scores[one].n_predictions == score.n_predictions
        assert close(scores[one].spliced.ce, score.spliced.ce)


@pytest.mark.parametrize("name", [path.name for path in sorted(RELEASES[0].glob("exports/*"))])
def test_an_export_is_written_again(place: Path, name: str) -> None:
    made, before = again(f"exports/{name}"), Path("exports") / name
    files = read_json(before / MANIFEST)["files"]
    assert sorted(read_json(made / MANIFEST)["files"]) == sorted(files)
    for file in (file for file in files if file.endswith(".safetensors")):
        found = load_file(made / file)
        for tensor, expected in load_file(before / file).items():
            np.testing.assert_allclose(found[tensor], expected, rtol=ROUNDING, atol=1e-6, err_msg=tensor)


def test_exports_are_taken_over(place: Path) -> None:
    for name in ("layer", "cross-layer"):
        made = again(f"imports/{name}")
        name = f"imports/{name}"
        assert comparable(name, read_values(made)) == comparable(name, read_values(Path(name)))


def test_a_task_and_a_dashboard_are_made_again(place: Path) -> None:
    for name in ("task", "dashboards/topk", "dashboards/blind"):
        made, before = (set(read_json(path / MANIFEST)["files"]) for path in (again(name), Path(name)))
        assert before - made == set()
        assert {file for file in made - before if not file.startswith(("site/", "data/"))} == set()


@pytest.mark.parametrize("name", ["dashboards/topk", "tables/topk"])
def test_pages_are_served(place: Path, name: str) -> None:
    with serve.open_server(Path(name), host="127.0.0.1", port=0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/index.html") as answer:
            assert b"<html" in answer.read()
        server.shutdown()


def test_a_blind_draw_is_tallied_and_a_study_concluded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = Path("blind/draw/ratings.csv")
    head, *items = ratings.read_text().splitlines()
    ratings.write_text("\n".join([head, *(f"{item.split(',')[0]},yes,no" for item in items)]) + "\n")
    pipeline("blind tally blind/draw", "blind study reveal blind/study", "blind study view blind/study 1")
    pipeline("blind study verdict blind/study right", "blind study log blind/study")
    assert "verdict: right" in capsys.readouterr().out


@pytest.mark.parametrize("killed", KILLED, ids=lambda one: one.output)
def test_unfinished_work_is_gone_on_with_to_its_end(place: Path, killed: Step) -> None:
    begun = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(killed.output).rglob("*.json*")}
    units = [path for path in begun if "-unit-" in path.name]
    logs = [path for path in begun if path.name == "timing.jsonl"]  # no two runs take the same time
    assert units or logs, "nothing was done before it was killed"
    run(killed, place)
    assert [path for path in units if path.stat().st_mtime_ns != begun[path][0]] == []
    assert [path for path in logs if not path.read_bytes().startswith(begun[path][1])] == []
    expected = {name: one for name, one in recorded(place, "finished").items() if is_inside(name, [killed.output])}
    assert expected
    for name, values in expected.items():
        found = json.loads(json.dumps(read_values(Path(name))))
        assert found["order"] == values["order"]
        assert close(found["numbers"], values["numbers"])
