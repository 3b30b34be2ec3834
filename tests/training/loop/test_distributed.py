"""Processes that share every batch take the steps that one process takes on all of its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import SettingsError
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.loop.distributed import SharedBatch, device_of_process, open_group, rows_of_rank
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batch_reductions import ALONE
from tests.support.distributed_children import KERNELS, WHOLE_RUNS, cases, load_results, take_step, train_planted
from tests.support.paths import ROOT
from tests.support.planted_runs import PlantedRows
from tests.support.quick import quick

WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("group")
    command = [sys.executable, "-W", "error", "-m", "tests.support.distributed_children", str(directory)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(WORLD)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        messages = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()  # one that waits for a process that failed
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(messages)
    return directory


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference in units of the largest wanted number."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    scale = max(float(wanted.double().abs().max()), 1e-30)
    return float((found.double() - wanted.double()).abs().max()) / scale


@pytest.mark.parametrize(
    "index", quick(range(len(cases())), *range(0, len(cases()), 5)), ids=["-".join(map(str, case)) for case in cases()]
)
def test_a_step_on_two_slices_is_the_step_on_the_whole_batch(results: Path, index: int) -> None:
    case = cases()[index]
    kernel = DenseStep() if case[2] == "dense and sparse" else KERNELS[case[2]][0]
    wanted = take_step(case, kernel)
    tolerance = 1e-12 if case[4] == torch.float64 else 1e-5
    for rank in range(WORLD):
        found = load_results(results, rank, f"step.{index}.")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            # BatchTopK's threshold is a float32 buffer, made double with the rest
            assert difference(found[name], value) <= tolerance, (rank, name)


@pytest.mark.parametrize("kind", WHOLE_RUNS)
def test_processes_stay_equal_bit_for_bit_and_train_as_one_would(results: Path, kind: str) -> None:
    # half-way the second one lost its state and was given the first one's
    wanted = train_planted(WHOLE_RUNS[kind], None)
    first, second = (load_results(results, rank, f"run.{kind}.") for rank in range(WORLD))
    assert first.keys() == second.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        assert difference(first[name], value) <= 1e-9, name  # ten steps of Adam on rounding of 1e-16


def test_slices_make_up_the_batch_in_order() -> None:
    batch = PlantedRows(batch_rows=7).next_batch()["planted"]
    slices = [batch.inputs[rows_of_rank(7, rank, 3)] for rank in range(3)]
    assert [len(rows) for rows in slices] == [2, 2, 3]
    assert torch.equal(torch.cat(slices), batch.inputs)


def test_a_batch_of_fewer_rows_than_processes_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch_rows: a batch of 2 rows cannot be shared by 3 processes"):
        rows_of_rank(2, 0, 3)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}])
def test_without_other_processes_there_is_no_group(environment: dict[str, str]) -> None:
    assert open_group(environment=environment) is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE is not set", "MASTER_ADDR is not set", "MASTER_PORT is not set"]),
        (
            {"RANK": "two", "WORLD_SIZE": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            ["RANK is 'two'", "WORLD_SIZE is '-1'"],
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            ["RANK is 2, but WORLD_SIZE is 2"],
        ),
    ],
)
def test_variables_that_describe_no_group_are_all_named(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError, match="torchrun") as caught:
        open_group(environment=environment)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("values", "certain", "n", "wanted"),
    [
        ([5.0, 1.0, 3.0, -2.0], 0.0, 2, (3.0, True)),
        ([5.0, 1.0, 3.0, -2.0], 3.5, 2, (3.0, False)),
        ([5.0, -2.0], 0.0, 3, (0.0, True)),  # fewer than wanted: all positive ones
        ([5.0, -2.0], 0.5, 3, (0.0, False)),
        ([5.0, -2.0], 0.0, 2, (0.0, True)),
    ],
)
def test_a_cut_is_complete_where_nothing_below_the_candidates_could_pass_it(
    values: list[float], certain: float, n: int, wanted: Any
) -> None:
    cut = ALONE.cut(torch.tensor(values), certain, n)
    assert (cut.threshold, cut.is_complete) == wanted


class Gathered:
    """Stands in for a group: what the processes would send is known."""

    device = torch.device("cpu")

    def __init__(self, rank: int, held: list[list[float]], n: int) -> None:
        self.rank = rank
        # no process needs to send more than n values
        self._sent = [sorted((value for value in values if value > 0), reverse=True)[:n] for values in held]

    def least(self, values: Tensor) -> Tensor:
        return values

    def gather(self, rows: Tensor) -> list[Tensor]:
        assert sorted(rows.tolist(), reverse=True) == self._sent[self.rank]
        return [torch.tensor(values) for values in self._sent]


@pytest.mark.parametrize(
    ("n", "kept"),
    [(1, [1, 0]), (2, [2, 0]), (3, [3, 0]), (4, [3, 1]), (5, [3, 2]), (6, [3, 3]), (9, [3, 3])],
)
def test_of_equal_values_in_several_processes_exactly_as_many_are_kept_as_in_one(n: int, kept: list[int]) -> None:
    held = [[3.0, -1.0, 2.0, 2.0], [2.0, 1.0, 2.0, 0.0]]
    found = []
    for rank, values in enumerate(held):
        group: Any = Gathered(rank, held, n)
        found.append(SharedBatch(group, 4, 8).cut(torch.tensor(values), 0.0, n).n_own)
    assert found == kept


def test_a_process_of_torchrun_opens_its_own_gpu_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert device_of_process("cuda", started) == "cuda:1"
    assert device_of_process("cuda", {}) == "cuda"
    assert device_of_process("cpu", started) == "cpu"
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    opened: list[str] = []

    def refuse(name: str) -> torch.device:
        opened.append(name)
        raise SettingsError("nothing is opened here")

    monkeypatch.setattr("tailrace.pipeline.shared.compute._open_device", refuse)
    with pytest.raises(SettingsError, match="nothing is opened"):
        train.run(TrainSettings(), cache=tmp_path, output=tmp_path / "run", compute=Compute(device="cuda"))
    assert opened == ["cuda:1"]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    started = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(SettingsError, match=r"torchrun started 4 processes .+ start it with --nproc-per-node 2"):
        device_of_process("cuda", started)
    assert device_of_process("cuda", {**started, "LOCAL_WORLD_SIZE": "2"}) == "cuda:0"
