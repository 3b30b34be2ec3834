"""What is read of a run's logs, and the sentence on how it went."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.training.loop.curves import find_runs, read_all, read_run, trend
from tests.support.run_logs import write_run

ROWS = np.arange(1, 101) * 64.0


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (np.linspace(1, 0.5, 100), "loss still falling, by 8.8% over the last tenth"),
        (np.full(100, 0.25), "loss flat over the last tenth"),
        (0.25 + 0.05 * np.tile([1.0, -1.0], 50), "loss flat over the last tenth"),
        (np.linspace(0.5, 0.8, 100), "loss rising, by 4.0%"),
        (np.r_[np.linspace(1, 0.1, 90), np.linspace(0.3, 9, 10)], "loss diverges: 46.5 times its lowest"),
        (np.full(100, math.nan), "too few lines logged to see whether the loss still falls"),
    ],
)
def test_the_trend_is_that_of_the_last_tenth_against_the_tenth_before(loss: np.ndarray, said: str) -> None:
    assert trend(ROWS, loss) == said


def test_a_line_that_is_being_written_is_left_out_and_the_clock_may_begin_anew(tmp_path: Path) -> None:
    write_run(tmp_path, n_lines=4)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 50, "rows": 32')
    lines = [
        {"step": 10, "seconds": 2.0},
        {"step": 20, "seconds": 4.0},
        {"step": 30, "seconds": 1.0},
        {"step": 40, "seconds": 3.0},
    ]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps({**line, "n_steps": 80}) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert (run.state, run.n_steps, run.progress) == ("unfinished", 80, "40 of 80 steps, 50%, loss 0.25")
    assert run.train["step"].tolist() == [10, 20, 30, 40]
    assert run.speed["step"].tolist() == [10, 20, 40]
    assert run.speed["rows_per_second"].tolist() == [320, 320, 320]
    assert math.isnan(run.heldout["fvu_ordinary"][-1])


def test_lines_that_a_power_cut_left_as_zeros_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, n_lines=4)
    line = json.dumps({"step": 20, "seconds": 4.0, "n_steps": 80}).encode() + b"\n"
    (tmp_path / "timing.jsonl").write_bytes(bytes(70) + line + bytes(20) + line[20:] + line)
    run = read_run(tmp_path)
    assert (run.n_steps, run.speed["step"].tolist()) == (80, [20])


def test_what_is_no_log_is_an_error_that_says_where(tmp_path: Path) -> None:
    write_run(tmp_path, n_lines=4)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": {}}\n')
    with pytest.raises(ArtifactCorrupt, match=r"metrics\.jsonl: has a line that is none of a log"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("linear", "said"),
    [
        (None, "FVU 0.3 (the mean scores 1)"),
        (0.5, "FVU 0.3 (the mean scores 1, a linear map 0.5)"),
        (0.2, "FVU 0.3 (the mean scores 1, a linear map 0.2): no better than the linear map"),
    ],
)
def test_the_verdict_sets_fvu_beside_the_mean_and_a_linear_map(tmp_path: Path, linear: float | None, said: str) -> None:
    write_run(tmp_path, n_lines=20, fvu=0.3, linear=linear)
    assert read_run(tmp_path).verdict.endswith(f"dead features 12.5%; {said}")


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, n_lines=2)
    (tmp_path / "diverged.json").write_text("{}")
    assert read_run(tmp_path).verdict.startswith("diverged: ")


def test_runs_of_sweeps_and_folders_are_in_the_order_of_their_numbers_and_named_apart(tmp_path: Path) -> None:
    for name in ("sweep/runs/k=16", "sweep/runs/k=8", "layers/layer10", "layers/layer9", "a/layer9"):
        write_run(tmp_path / name, n_lines=1)
    assert list(find_runs(tmp_path / "sweep")) == ["k=8", "k=16"]
    names = [run.name for run in read_all([tmp_path / "layers", tmp_path / "a"])]
    assert names == [f"{tmp_path}/layers/layer9", "layer10", f"{tmp_path}/a/layer9"]
    with pytest.raises(ArtifactMissing, match="holds no run"):
        read_all([tmp_path / "nothing"])


def test_json_has_no_number_that_is_none(tmp_path: Path) -> None:
    write_run(tmp_path, n_lines=3)
    written: dict[str, Any] = json.loads(json.dumps(read_run(tmp_path).as_json(), allow_nan=False))
    assert written["heldout"]["fvu_ordinary"] == [None] * 3
    assert written["train"]["loss"] == [1.0, 0.5, pytest.approx(1 / 3)]
