"""Whatever a user or a stranger hands over is answered or refused with the next step: no traceback, no hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from tailrace.storage.errors import SettingsError
from tests.faults import fuzz, hostile
from tests.faults.readers import READERS

QUICK = [name for name in READERS if name not in ("models", "text_files", "attached_files", "flags")]


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (partial({}.pop, "site"), "KeyError at a line of the tests"),
        (lambda: time.sleep(5), "hangs at a line of the tests"),
        (lambda: sum(range(10**7)), "takes more than 0 s of the processor"),
    ],
)
def test_what_goes_wrong_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], object], problem: str
) -> None:
    monkeypatch.setattr(fuzz, "HANGS_SECONDS", 0.2 if "hangs" in problem else 60.0)
    monkeypatch.setattr(fuzz, "SECONDS", 0.001 if "processor" in problem else 60.0)
    counts = fuzz.Counts("a test")
    counts.add(fuzz.judge(read), "input")
    assert counts.failures == {problem: ["input"]}
    assert f"1 failed\n{problem} (1 times, first input)" in str(counts)


def test_an_input_that_takes_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "GROWTH_BYTES", 1 << 24)
    n_bytes = fuzz.peak_bytes()  # a block as large as all that there ever was raises the peak
    outcome = fuzz.judge(lambda: len(b"x" * n_bytes))
    assert outcome.problem == "takes more than 16 MiB"


def test_an_error_that_says_what_to_do_is_none() -> None:
    def refuse() -> None:
        raise SettingsError("k: wanted another")

    assert fuzz.judge(refuse) == fuzz.Outcome(False)
    assert fuzz.judge(lambda: None) == fuzz.Outcome(True)


def test_some_random_inputs() -> None:
    counts = fuzz.run(0, 600, inputs=2 * len(QUICK), only=QUICK)
    assert (counts.inputs, counts.failures) == (2 * len(QUICK), {})
    assert min(counts.answered, counts.refused) > 5


def test_some_hostile_artifacts() -> None:
    counts = hostile.run(0, 600, inputs=12)
    assert (counts.inputs, counts.failures) == (12, {})


@pytest.mark.parametrize(
    "pair",
    [
        # a loop of links was looked through for files
        "exports/circuit-tracer: files are links to themselves: import",
        # scores of two layers and one transcoder
        "evaluations/layers: inputs.transcoders.layer1 is gone: pareto",
        # a limit of infinity reached the manifest
        "transcoders/cross-layer: request.settings.max_norm_multiple is 1e+308: train",
    ],
)
def test_a_hostile_artifact_that_failed_once_is_refused_or_answered(pair: str) -> None:
    counts = hostile.run(0, 600, only=pair)
    assert counts.inputs
    assert counts.failures == {}


@pytest.mark.slow
def test_a_hundred_thousand_random_inputs() -> None:
    counts = fuzz.run(1, 4 * 3600, inputs=100_000)
    assert (counts.inputs, counts.failures) == (100_000, {})


@pytest.mark.slow
def test_hostile_artifacts_of_every_kind() -> None:
    counts = hostile.run(1, 4 * 3600, inputs=10_000)
    assert (counts.inputs, counts.failures) == (10_000, {})
