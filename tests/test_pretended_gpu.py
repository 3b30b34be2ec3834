"""What users run on a GPU runs to the end on a pretended one and gives the numbers of the CPU.

Some cases run in ``make test``; the rest are slow. Each group of them shares one process, since torch has to be
imported after the shim of ``tests/support/pretended_gpu.py`` is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="no C++ compiler, which the pretended GPU's shim needs",
)

RELATIVE = 1e-5
"""The host does the same float32 arithmetic for both devices, but Adam is torch's on CUDA and BlockedAdam on the CPU;
they agree to rounding (1e-7 a step), which 12 steps amplify."""

QUICK = (
    *("method", "topk", "jumprelu", "batch_topk", "resume adam", "analyze", "interventions", "threshold gradients"),
    *("rows in buckets", "rows that are kept", "steps between log lines, topk", "steps between log lines, jumprelu"),
)
BFLOAT16 = 2e-3
"""Both devices round the same products to bfloat16; where autocast keeps more digits on CUDA, scores differ by this."""


def run_cases(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what became of the cases, by name; without names, of those that take long."""
    command = [sys.executable, "-m", "tests.support.gpu_cases", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert names in ((), ("sparse",)) or [outcome["case"] for outcome in outcomes] == list(names)
    return {outcome["case"]: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("quick"), QUICK)


def check_agrees(outcome: dict[str, Any]) -> None:
    relative = BFLOAT16 if outcome["case"].endswith("in bfloat16") else RELATIVE
    gpu, cpu = outcome["cuda"], outcome["cpu"]
    assert "error" not in gpu, gpu["error"]
    assert "error" not in cpu, cpu["error"]
    assert cpu["numbers"]
    assert gpu["numbers"] == pytest.approx(cpu["numbers"], rel=relative, abs=relative)


@pytest.mark.parametrize("case", QUICK)
def test_agrees_with_the_cpu(case: str, quick: dict[str, dict[str, Any]]) -> None:
    check_agrees(quick[case])


@pytest.mark.slow
def test_everything_else_agrees_with_the_cpu(tmp_path: Path, subtests: pytest.Subtests) -> None:
    outcomes = run_cases(tmp_path, ())
    assert len(outcomes) > 30
    for case, outcome in outcomes.items():
        with subtests.test(case):
            check_agrees(outcome)


@pytest.mark.slow
def test_the_sparse_step_agrees_with_that_of_the_cpu_and_waits_for_nothing(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    outcomes = run_cases(tmp_path, ("sparse",))
    assert len(outcomes) == 15
    for case, outcome in outcomes.items():
        with subtests.test(case):
            check_agrees(outcome)


def test_an_architecture_copies_nothing_to_the_device_in_a_step(quick: dict[str, dict[str, Any]]) -> None:
    for case in ("topk", "batch_topk", "jumprelu"):
        copies = [line for line in quick[case]["cuda"]["copies"] if "to the device" in line]
        assert not [line for line in copies if "training/architectures/" in line or "training/kernels/" in line]


def test_no_step_waits_for_its_rows(quick: dict[str, dict[str, Any]]) -> None:
    for case in ("topk", "batch_topk", "jumprelu"):
        asked = quick[case]["cuda"]
        rows = [line for line in (*asked["waits"], *asked["copies"]) if "training/rows/" in line]
        # the normalisation's means, and the rows of the linear baseline, go to the device before the first step
        rows = [line for line in rows if not re.search(r"training/rows/(normalisation|row_source)\.py", line)]
        assert rows
        assert all("(in another thread)" in line or line.startswith("stream at") for line in rows), rows


def test_waits_and_copies_are_recorded_with_their_line(quick: dict[str, dict[str, Any]]) -> None:
    asked = quick["topk"]["cuda"]
    assert any(
        line.startswith("to the device, without a wait at training/rows/device_rows.py:") for line in asked["copies"]
    )
    assert any("training/loop/step_metrics.py:" in line for line in asked["waits"])
    assert not quick["method"]["cpu"].get("copies")


def test_analysis_waits_for_the_number_of_active_pairs_and_for_finished_blocks_alone(
    quick: dict[str, dict[str, Any]],
) -> None:
    asked = quick["analyze"]["cuda"]
    waits = [line for line in asked["waits"] if "analysis/harvest/" in line]
    assert {line.split(" at ")[0] for line in waits} == {"aten::nonzero", "event"}
    assert all("encoding.py" in line for line in waits)
    copies = [line for line in asked["copies"] if "rows/transfer.py" in line or "analysis/harvest/" in line]
    assert copies
    assert all("without a wait" in line for line in copies)
