"""The check of a GPU: what it does with time, errors and a device that dies, and that all of it runs without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import outcomes, processes
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import (
    Check,
    NotHereError,
    Numbers,
    Record,
    WrongError,
    outcome_of,
    rounded,
    run_checks,
    table,
)
from benchmarks.gpu_check.pack import (
    MODEL_PACKAGES,
    PACKAGES,
    copy_sources,
    describe_project,
    pinned,
    remove_unused,
    starter,
)
from tests.support.paths import ROOT

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def raising(error: Exception) -> Callable[[], Numbers]:
    def run() -> Numbers:
        raise error

    return run


def run_all(record: Record, *checks: Check, **changes: Any) -> list[str]:
    """Run checks with all the time there is; return what was said."""
    said: list[str] = []
    options: dict[str, Any] = {
        "seconds_left": lambda: 100.0,
        "broken": lambda: False,
        "begin_anew": lambda: pytest.fail("nothing is wrong with the device"),
        "patience": None,
        "say": said.append,
    }
    run_checks(checks, record, **{**options, **changes})
    return said


def test_every_outcome_is_on_disk_before_the_next_check(tmp_path: Path) -> None:
    record = Record(tmp_path / "out" / "lines.jsonl")

    def second() -> Numbers:
        (line,) = (tmp_path / "out" / "lines.jsonl").read_text().splitlines()
        return {"seen": json.loads(line)["check"]}

    run_all(record, Check("first", "cost", 1, dict), Check("second", "cost", 1, second))
    assert record.outcomes[1].numbers == {"seen": "first"}


def test_each_end_of_a_check_has_its_word() -> None:
    ends = {
        "ok": lambda: {"ms": 1.23456, "rows": 3},
        "wrong": raising(WrongError("fvu is 2 on the device")),
        "failed": raising(ValueError("broken")),
        "skipped": raising(NotHereError("no card")),
    }
    for status, run in ends.items():
        outcome = outcome_of(Check("one", "correctness", 1, run))
        assert outcome.status == status
    assert outcome_of(Check("one", "cost", 1, ends["ok"])).numbers == {"ms": 1.235, "rows": 3}
    failed = outcome_of(Check("one", "cost", 1, ends["failed"]))
    assert failed.why == "ValueError: broken"
    assert any("test_gpu_check.py" in line for line in failed.at)


def test_a_package_that_is_not_installed_is_a_reason_to_skip_and_a_broken_one_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcomes, "OPTIONAL", ("not_installed_anywhere", "numpy"))
    absent = ModuleNotFoundError("No module named 'not_installed_anywhere.x'", name="not_installed_anywhere.x")
    skipped = outcome_of(Check("one", "correctness", 1, raising(absent)))
    assert (skipped.status, skipped.why) == ("skipped", "not_installed_anywhere is not installed")
    for name in ("numpy.gone", "tailrace.gone"):
        broken = ModuleNotFoundError(f"No module named {name!r}", name=name)
        assert outcome_of(Check("one", "correctness", 1, raising(broken))).status == "failed"


def test_what_does_not_fit_into_the_time_left_is_skipped_and_said(tmp_path: Path) -> None:
    record = Record(tmp_path / "lines.jsonl")
    said = run_all(
        record,
        Check("long", "cost", 40, raising(AssertionError("was begun"))),
        Check("short", "cost", 5, dict),
        seconds_left=lambda: 30.0,
    )
    assert [outcome.status for outcome in record.outcomes] == ["skipped", "ok"]
    assert "30 s left, it needs about 40" in said[0]


@pytest.mark.parametrize(
    ("kind", "error", "failed"),
    [
        ("correctness", WrongError("other"), True),
        ("correctness", ValueError("broken"), True),
        ("correctness", NotHereError("no package"), False),
        ("cost", ValueError("broken"), False),
    ],
)
def test_only_correctness_decides_the_exit_status(tmp_path: Path, kind: Any, error: Exception, failed: bool) -> None:
    record = Record(tmp_path / "lines.jsonl")
    run_all(record, Check("one", kind, 1, raising(error)))
    assert record.has_failed is failed


def test_after_a_failure_that_leaves_the_device_dead_a_new_process_continues(tmp_path: Path) -> None:
    class Replaced(Exception):
        pass

    path = tmp_path / "lines.jsonl"
    first = Check("first", "cost", 1, raising(RuntimeError("CUDA error: an illegal memory access was encountered")))
    second = Check("second", "cost", 1, dict)
    with pytest.raises(Replaced):
        run_all(Record(path), first, second, broken=lambda: True, begin_anew=raising(Replaced()))
    continued = Record(path, continued=True)
    run_all(continued, first, second)
    assert [(outcome.check, outcome.status) for outcome in continued.outcomes] == [
        ("first", "failed"),
        ("second", "ok"),
    ]


def test_a_check_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    record, begun_anew = Record(tmp_path / "lines.jsonl"), []

    def hang() -> Numbers:
        time.sleep(0.4)
        return {}

    hanging = Check("hanging", "cost", 0.05, hang)
    run_all(record, hanging, begin_anew=lambda: begun_anew.append(len(record.outcomes)), patience=2)
    assert begun_anew == [1]  # the outcome was written first
    assert (record.outcomes[0].status, record.outcomes[0].why) == ("failed", "did not end in 0 s")


def test_the_table_has_what_is_wrong_first_and_no_stray_column(tmp_path: Path) -> None:
    record = Record(tmp_path / "lines.jsonl")
    run_all(
        record,
        Check("good", "cost", 1, lambda: {"ms": {"auto": 2.0}}),
        Check("bad", "correctness", 1, raising(WrongError("a | b\nc"))),
    )
    lines = table(record.outcomes).splitlines()
    assert lines[0] == "1 ok, 1 wrong, 0 failed, 0 skipped"
    assert lines[4].startswith("| bad | wrong |")
    assert lines[4].endswith("| a / b c |")
    assert lines[5].endswith("| ms auto 2.0 |")


def test_a_device_is_timed_by_its_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, later: Event) -> float:
            return 5.0 * (later.at - self.at)  # milliseconds

    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    calls: list[int] = []
    timing = Bench("cuda", tmp_path).time(lambda: calls.append(1), n=4, warm=3)
    assert (len(calls), len(waits)) == (7, 2)
    assert timing.device == pytest.approx(5e-3)
    assert 0 < timing.wall < 1


def test_numbers_become_json() -> None:
    assert rounded({"a": 123456.789, 3: (True, None, Path("x"))}) == {"a": 123500.0, "3": [True, None, "x"]}


def test_every_packed_package_has_a_pin() -> None:
    wanted = pinned((*PACKAGES, *MODEL_PACKAGES))
    assert len(wanted) == len(PACKAGES) + len(MODEL_PACKAGES)
    assert any(line.startswith("PyYAML==") for line in wanted)
    with pytest.raises(SystemExit, match="no pin of not-a-package"):
        pinned(["zarr", "not-a-package"])


def test_only_what_no_check_opens_is_left_out_of_packages(tmp_path: Path) -> None:
    kept = ("pyarrow/lib.cpython-312-x86_64-linux-gnu.so", "pyarrow/libarrow.so.2600", "zarr/testing/store.py")
    gone = ("pyarrow/libarrow_python.so", "pyarrow/libarrow_flight.so.2600", "pandas/tests/test_a.py", "zarr/a.pyi")
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unused(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


def test_the_packed_project_tells_its_version_and_its_data_type(tmp_path: Path) -> None:
    describe_project(tmp_path)
    (described,) = distributions(path=[str(tmp_path)])
    assert described.version == version("tailrace")
    assert {entry.group for entry in described.entry_points} == {"zarr.data_type", "zarr.buffer"}


def test_a_pack_for_another_python_says_so(tmp_path: Path) -> None:
    (tmp_path / "__main__.py").write_text(starter("3.99"))
    done = subprocess.run([sys.executable, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("this is packed for Python 3.99 and runs on 3.")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler, which the pretended GPU's shim needs")
def test_the_packed_sources_are_all_that_a_check_needs_of_this_checkout(tmp_path: Path) -> None:
    copy_sources(tmp_path / "source")
    (tmp_path / "__main__.py").write_text(starter(f"{sys.version_info.major}.{sys.version_info.minor}"))
    command = [sys.executable, str(tmp_path), "--out", "results", "--pretend", "--only", "cache and verify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "1 ok, 0 wrong" in done.stdout


def check_gpu(out: Path, *options: str) -> list[dict[str, Any]]:
    """Run the command; return its outcomes."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), "--minutes", "60", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    outcomes = [json.loads(line) for line in (out / "gpu_check.jsonl").read_text().splitlines()]
    bad = [outcome for outcome in outcomes if outcome["status"] in ("wrong", "failed")]
    assert bad == []
    assert done.returncode == 0, done.stderr[-4000:]
    assert (out / "gpu_check.md").read_text() in done.stdout
    return outcomes


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler, which the pretended GPU's shim needs")
def test_the_correctness_half_passes_on_a_pretended_gpu(tmp_path: Path) -> None:
    outcomes = check_gpu(tmp_path, "--pretend")
    assert {outcome["kind"] for outcome in outcomes} == {"correctness"}
    assert [outcome["check"] for outcome in outcomes if outcome["status"] == "skipped"] == []
    names = {outcome["check"] for outcome in outcomes}
    assert {"gradients, topk", "topk", "resume adam", "cache and verify", "evaluate", "circuit and score"} <= names


PACKED_WITHOUT = ("pytest", "hypothesis", "zarrs", "tensorstore", "duckdb")
"""Packages that tests import and a machine with a GPU may lack."""


def test_cases_are_imported_where_no_test_runner_is_installed() -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({PACKED_WITHOUT!r}))\n"
        "from benchmarks.gpu_check.bench import leave_pretended_gpu_out\n"
        "leave_pretended_gpu_out()\n"
        "from benchmarks.gpu_check import correctness\n"
        "print([name for name in sys.modules if name.startswith('tests.') and 'support' not in name])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows shared, batch_topk", "features shared, layers"])
def test_processes_of_torchrun_are_compared_with_one(name: str, tmp_path: Path) -> None:
    found = processes.compared("cpu", Bench("cpu", tmp_path), name, "sparse")
    assert found["largest difference"] < 1e-3


def test_a_machine_with_one_gpu_says_that_two_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotHereError, match="one GPU is here, and two are needed"):
        processes.compared("cuda", Bench("cuda", tmp_path), "features shared, topk", "sparse")


def test_steps_are_timed_at_small_sizes(tmp_path: Path) -> None:
    outcomes = check_gpu(tmp_path, "--dry", "--only", "batch_topk")
    assert [outcome["status"] for outcome in outcomes] == ["ok", "ok"]


@pytest.mark.slow
def test_the_cost_half_runs_at_small_sizes(tmp_path: Path) -> None:
    outcomes = check_gpu(tmp_path, "--dry", *(["--pretend"] if HAS_COMPILER else []))
    assert {outcome["kind"] for outcome in outcomes} == {"cost"}
    skipped = {outcome["check"] for outcome in outcomes if outcome["status"] == "skipped"}
    peers = {f"step of {name}, 512" for name in ("SAELens", "dictionary_learning", "sparsify")}
    assert skipped <= {"GPUDirect reads", *peers}
