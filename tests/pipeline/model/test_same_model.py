"""One rule says whether two artifacts record the same language model, and every command that asks goes by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tests.support.cache_jobs import run_cache
from tests.support.paths import ROOT
from tests.support.spliced_models import publish_transcoder, random_transcoder

FOLDER = {
    "name": "tiny",
    "files_digest": "sha256:1",
    "d_model": 8,
    "tokenizer": {"digest": "sha256:3"},
    "versions": {"torch": "2.13.0"},
}
HUB = {"name": "gpt2", "files_digest": None, "revision": "abc", "d_model": 8, "versions": {"torch": "2.13.0"}}


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (FOLDER, {"versions": {"torch": "2.14.0"}}),
        (FOLDER, {"name": "renamed"}),
        (FOLDER, {"recorded_by_a_later_release": 1}),
        (FOLDER, {"tokenizer": {"digest": "sha256:3", "recorded_by_a_later_release": 1}}),
        (HUB, {"versions": {}}),
    ],
)
def test_the_same_model_stays_the_same(model, change):
    assert list_model_differences(model, {**model, **change}) == []
    assert list_model_differences({**model, **change}, model) == []


@pytest.mark.parametrize(
    ("model", "change", "line"),
    [
        (FOLDER, {"files_digest": "sha256:2"}, "files_digest (content of the model's folder, such as other weights)"),
        (FOLDER, {"d_model": 16}, "d_model (width of the residual stream): there it is 8, asked for 16"),
        (HUB, {"name": "gpt2-medium"}, "name: there it is 'gpt2', asked for 'gpt2-medium'"),
        (HUB, {"revision": "def"}, "revision (commit on the hub): there it is 'abc', asked for 'def'"),
    ],
)
def test_another_model_is_told_by_what_differs(model, change, line):
    (found,) = list_model_differences(model, {**model, **change})
    assert found.startswith(line)


def test_what_is_ignored_may_differ_and_nothing_else():
    changed = {**HUB, "d_model": 16, "revision": "def"}
    assert len(list_model_differences(HUB, changed, ignored=["d_model"])) == 1


def test_a_transcoder_of_a_cache_made_with_other_libraries_is_taken_by_every_command(tmp_path: Path) -> None:
    run_cache(tmp_path / "cache", layers="0")
    cache = open_cache(tmp_path / "cache")
    older = {**cache.manifest.model, "versions": {"torch": "2.6.0", "transformers": "5.9.0"}}
    transcoder = tmp_path / "transcoder"
    publish_transcoder(transcoder, cache, "layer0", random_transcoder(), {"model": older})
    given: dict[str, Any] = {"cache": tmp_path / "cache", "compute": Compute(threads=1, quiet=True)}
    settings = AnalyzeSettings(rows=30, without_model=True)
    assert analyze.run(settings, transcoder=transcoder, output=tmp_path / "tables", **given).n_rows == 30
    scored = evaluate.run(
        EvaluateSettings(contexts=2),
        transcoders=[transcoder],
        output=tmp_path / "evaluation",
        **given,
    )
    assert scored.scores.keys() == {"layer0"}
    written = export.run(
        ExportSettings(rows=256), to="saelens", sources=[transcoder], output=tmp_path / "out", cache=tmp_path / "cache"
    )
    assert written.files


def test_no_other_module_decides_which_part_of_an_identity_counts():
    rule = re.compile(r"""[!=]= ["']versions["']|\{["']versions["'],""")
    repository = ROOT
    modules = [path for folder in ("pipeline", "analysis", "training") for path in (repository / folder).rglob("*.py")]
    deciding = [path.name for path in modules if rule.search(path.read_text(encoding="utf-8"))]
    assert deciding == ["same_model.py"]
