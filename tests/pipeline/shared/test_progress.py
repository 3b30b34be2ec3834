"""How far a command is: a bar in a terminal, plain lines in a log, and nothing of what is over soon."""

from __future__ import annotations

import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from tailrace.pipeline.shared import progress
from tailrace.pipeline.shared.progress import Progress, RowProgress
from tailrace.pipeline.shared.units import duration


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by ten seconds at every look."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.mark.usefixtures("seconds")
def test_a_log_gets_a_line_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(146, "train", "steps", quiet=False) as bar:
        for step in range(9):
            bar.update(note=f"loss 0.{step}")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "train: 3/146 steps 2%, loss 0.2, 0.06 steps/s, 40 min left"
    assert [line.partition("/")[0] for line in said] == ["train: 3", "train: 5", "train: 7", "train: 9"]


@pytest.mark.usefixtures("seconds")
def test_nothing_is_said_where_quiet_and_what_was_there_before_is_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with RowProgress(1_000_000, quiet=True, title="cache") as bar:
        bar.skip(400_000)
        bar.update(100_000)
        bar.committed(2_000_000_000)
    assert capsys.readouterr().err == ""
    assert bar.n_new_rows == 100_000
    assert bar.line() == "cache: 500k/1M rows 50%, 2.00 GB written, 10k rows/s, 50 s left"


def test_what_is_over_soon_prints_nothing_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(3, "pages", "pages", quiet=False).of("abc")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "train", "steps", quiet=False, done=1) as bar:
        bar.update(3, "loss 0.5")
    assert "train: 100%" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()


def test_times_have_the_unit_that_is_easiest_to_read() -> None:
    seconds = (0.2, 72, 90, 597, 5400, 86_400, 172_800)
    assert [duration(one) for one in seconds] == ["1 s", "72 s", "1.5 min", "10 min", "1.5 h", "24 h", "2.0 days"]


def test_a_notebook_gets_a_bar_though_no_terminal_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    with Progress(4, "train", "steps", quiet=False) as bar:
        bar.update(4, "loss 0.5")
    assert "train: 100%" in capsys.readouterr().err
