"""``pipeline doctor``: what it measures is there, and what it says of it follows from the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tailrace.pipeline.cli import cli
from tailrace.pipeline.doctor import stage
from tailrace.pipeline.doctor.stage import RowRates
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.errors import SettingsError
from tailrace.training.loop.settings import TrainSettings
from tests.support.training_caches import small_cache


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "_SECONDS", 0.02)
    monkeypatch.setattr(stage, "_FILE_BYTES", 1 << 20)
    monkeypatch.chdir(tmp_path)


def test_a_machine_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["doctor", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["device"] == "cpu"
    assert report["limits"] is None
    assert report["versions"]["torch"].startswith("2.")
    assert 1e6 < report["rates"]["disk"] < 1e12
    assert 1e8 < report["rates"]["float32"] < 1e14
    assert report["free_memory_bytes"] <= report["memory_bytes"]
    assert list(tmp_path.iterdir()) == []  # the file that was read is gone


def test_with_a_cache_it_says_what_limits(tmp_path: Path) -> None:
    small_cache(tmp_path / "cache", d_in=16, d_out=12)
    done = CliRunner().invoke(cli, ["doctor", "cache", "--d-sae", "256", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "256 features" in done.stdout
    assert " limits: " in done.stdout


def test_rates_become_rows_by_the_bytes_of_a_row(tmp_path: Path) -> None:
    cache = open_cache(small_cache(tmp_path / "cache", d_in=16, d_out=12))
    site = cache.sites["mlp"]
    limits = stage.run(cache=tmp_path / "cache", settings=TrainSettings.read({"d_sae": 64, "batch_rows": 64})).limits
    assert limits is not None
    assert limits.row_bytes == site.row_bytes
    with pytest.raises(SettingsError, match="--site must be one of"):
        stage.run(cache=tmp_path / "cache", settings=TrainSettings.read({"site": "layer77"}))


@pytest.mark.parametrize("wait", [0.1, 2.0, 9.0])
def test_a_reader_that_loads_ahead_is_timed_over_whole_buckets(wait: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, n_served = 0.0, 0

    def read() -> int:
        nonlocal clock, n_served
        if n_served and n_served % 1000 == 0:  # the next bucket: 1000 rows after a wait, then at once
            clock += wait
        n_served += 50
        return 50

    monkeypatch.setattr(stage, "_SECONDS", 1.5)
    monkeypatch.setattr("tailrace.pipeline.doctor.stage.time.perf_counter", lambda: clock)
    assert stage.sustained_rate(read, 1000) == pytest.approx(1000 / wait)


LIMITS = RowRates(
    cache="caches/a",
    site="layer8",
    row_bytes=3072,
    d_sae=24576,
    kernel="auto",
    needed_bytes=1,
    disk=690e3,
    reader=2e6,
    copy_to_device=7e6,
    step=3.5e6,
)


def test_the_slowest_part_is_named_with_what_the_others_could() -> None:
    assert LIMITS.sentence().startswith("the disk limits: 690k rows/s; steps could take 3.5M: a sweep trains")
    slow_step = LIMITS.model_copy(update={"step": 9_000.0})
    assert slow_step.sentence() == "the step limits: 9k rows/s; reading could give 690k"
    slow_copy = LIMITS.model_copy(update={"copy_to_device": 500e3})
    assert slow_copy.sentence().startswith("the copy to the GPU limits: 500k rows/s; steps could take 3.5M: int8")
    slow_reader = LIMITS.model_copy(update={"reader": 600e3})
    assert slow_reader.sentence().startswith("the reader limits: 600k rows/s")
