"""Tables made of fresh text are those of a cache of the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.command import command
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ActionableError, ModelError, SettingsError, TextError
from tailrace.storage.tables import read_table
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import CONTEXT_LENGTH, model_folder, run_cache, text_file

TEXT: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "contexts_per_batch": 4}
SETTINGS: dict[str, Any] = {"rows": 450, "examples": 3, "window_before": 3, "window_after": 3, "block_rows": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the first 450 rows of the text, and a transcoder trained on it."""
    root = tmp_path_factory.mktemp("live")
    run_cache(root / "cache", tokens="450", holdout="0")
    training = TrainSettings.read(
        {"architecture": {"kind": "batch_topk", "k": 4}, "d_sae": 32, "steps": 12, "batch_rows": 32, "lr": 1e-2}
    )
    train.run(training, cache=root / "cache", output=root / "transcoder", compute=Compute(threads=1, quiet=True))
    return root


def from_text(made: Path, output: Path, text: dict[str, Any] | None = None, **arguments: Any) -> analyze.AnalyzeResult:
    live = FreshText.read({"dataset": str(text_file()), **TEXT}, text or {})
    settings = AnalyzeSettings.read(SETTINGS, arguments.pop("settings", {}))
    place: dict[str, Any] = {
        "transcoder": made / "transcoder",
        "output": output,
        "model": str(model_folder()),
        "compute": Compute(threads=1, quiet=True),
    }
    return analyze.run(settings, **{**place, "live": live, **arguments})


@pytest.fixture(scope="module")
def live(made: Path) -> Path:
    from_text(made, made / "live")
    return made / "live"


@pytest.mark.parametrize("unit_rows", [64, pytest.param(65_536, marks=pytest.mark.slow)])
def test_tables_of_fresh_text_have_the_bytes_of_a_caches(
    made: Path, tmp_path: Path, unit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the unit that a row is stored in, and rounding of sums where units are cut elsewhere."""
    monkeypatch.setattr("tailrace.pipeline.live.token_order.UNIT_ROWS", unit_rows)
    from_text(made, tmp_path / "live")
    settings = AnalyzeSettings.read(SETTINGS, {"split": "train", "rows": None})
    cached: dict[str, Any] = {"cache": made / "cache", "transcoder": made / "transcoder", "model": str(model_folder())}
    analyze.run(settings, **cached, output=tmp_path / "cached", compute=Compute(threads=1, quiet=True))
    for name in ("activations/features-000000-000031", "rows", "coactivation", "connections"):
        live, stored = ((tmp_path / side / f"{name}.parquet").read_bytes() for side in ("live", "cached"))
        assert live == stored, name
    live, stored = (read_table(tmp_path / side / "examples.parquet") for side in ("live", "cached"))
    assert live.drop_columns("unit") == stored.drop_columns("unit")
    assert live.num_rows > 100
    columns = ["feature", "n_active", "max", "histogram", "position_frequency", "n_token_ids", "promoted_tokens"]
    live, stored = (read_table(tmp_path / side / "features.parquet", columns) for side in ("live", "cached"))
    assert live == stored
    live, stored = (read_table(tmp_path / side / "layers.parquet").to_pylist()[0] for side in ("live", "cached"))
    assert live.pop("fvu") == pytest.approx(stored.pop("fvu"), rel=1e-12)
    assert live.pop("mean_squared_error") == pytest.approx(stored.pop("mean_squared_error"), rel=1e-12)
    assert (live.pop("split"), stored.pop("split")) == ("live", "train")
    assert live == stored


def test_the_artifact_names_the_text_and_is_sound(made: Path, live: Path) -> None:
    assert verify_artifact(live, "tables") == []
    manifest = json.loads((live / "manifest.json").read_text())
    assert manifest["inputs"]["live"]["context_length"] == CONTEXT_LENGTH
    assert manifest["inputs"]["text"]
    assert "cache" not in manifest["inputs"]


def test_published_tables_are_returned_without_the_model(made: Path, live: Path) -> None:
    result = from_text(made, live, model="/nowhere")
    assert result.n_rows == 450


@pytest.mark.slow
def test_documents_can_be_left_out(made: Path, tmp_path: Path) -> None:
    from_text(made, tmp_path / "t", text={"holdout": "0,1"}, settings={"rows": 100})
    documents = read_table(tmp_path / "t" / "rows.parquet")["document"].to_pylist()
    assert set(documents).isdisjoint({0, 1})


def test_less_text_than_asked_for_is_read_to_its_end(made: Path, tmp_path: Path, caplog: Any) -> None:
    result = from_text(made, tmp_path / "t", settings={"rows": 10**6, "activations": "none", "without_model": True})
    assert 1200 < result.n_rows < 1300
    assert "rows of the 1,000,000 wanted" in caplog.text


def refused(made: Path, tmp_path: Path, error: type[ActionableError], match: str, **arguments: Any) -> None:
    with pytest.raises(error, match=match):
        from_text(made, tmp_path / "t", **arguments)


def test_what_cannot_be_done_is_refused_with_what_to_do(made: Path, tmp_path: Path) -> None:
    refused(made, tmp_path, SettingsError, "not from both: give either --cache, or --live", cache=made / "cache")
    refused(made, tmp_path, SettingsError, "give --rows, such as 100k", settings={"rows": None})
    refused(made, tmp_path, SettingsError, "not with --live", compute=Compute(workers=2))
    refused(made, tmp_path, ModelError, "use at most 64", text={"context_length": 65})
    (tmp_path / "short.txt").write_text("the of to")
    refused(made, tmp_path, TextError, "too short", text={"dataset": str(tmp_path / "short.txt")})
    assert from_text(made, tmp_path / "t").n_rows == 450  # none of them left anything in the way


def test_the_command_reads_fresh_text_and_refuses_its_settings_beside_a_cache(made: Path, tmp_path: Path) -> None:
    run = CliRunner()
    place = [str(made / "transcoder"), "--out", str(tmp_path / "t"), "--quiet", "--without-model"]
    fresh = ["--dataset", str(text_file()), "--context-length", "16"]
    live = ["--live", "--rows", "100", "--model", str(model_folder()), *fresh]
    assert run.invoke(command, [*place, *live], catch_exceptions=False).exit_code == 0
    assert read_table(tmp_path / "t" / "layers.parquet")["n_rows"].to_pylist() == [100]
    with pytest.raises(SettingsError, match="--dataset, --context-length: only with --live"):
        run.invoke(command, [*place, "--cache", str(made / "cache"), *fresh], catch_exceptions=False)
