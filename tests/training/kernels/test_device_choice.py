"""Which step a GPU takes: what the proof, the density of features and errors decide."""

from __future__ import annotations

from tests.support import interpreted  # isort: skip  (before anything that imports the programs)

import json
import logging
from typing import Any

import pytest
import torch

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import ReLU, TopK
from tailrace.training.kernels.device.choice import DeviceChoice
from tailrace.training.kernels.device.step import DeviceStep
from tailrace.training.rows.batches import Batch
from tests.support.small_steps import OBJECTIVE, CountedStep, small_step, with_random_weights

assert interpreted.__doc__


def test_room_follows_what_was_wanted_two_steps_ago_and_a_resumed_run_has_as_much(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transcoder, _, _, batch = small_step()
    step = CountedStep()
    choice = DeviceChoice(step, "float32", name="run", prove=False)
    room: list[int | None] = []
    for n_wanted in (20, 20, 50, 50, 50, 50):
        step.n_wanted = n_wanted
        if len(room) == 4:  # two numbers are on their way
            state = json.loads(json.dumps(choice.state()))
            step = CountedStep()
            step.n_wanted = n_wanted
            choice = DeviceChoice(step, "float32", name="run", prove=False)
            choice.load_state(state)
        with caplog.at_level(logging.WARNING):
            choice(transcoder, batch, OBJECTIVE)
        room.append(step.n_slots)
    most = 5 * 12
    assert room == [None, None, most, most, most, most]
    assert not caplog.records


def test_each_step_that_had_too_little_room_is_said(caplog: pytest.LogCaptureFixture) -> None:
    transcoder = with_random_weights(ReLU(l1=0.1).build(4, 3, 12)).float()
    _, _, _, batch = small_step()
    step = CountedStep()
    choice = DeviceChoice(step, "float32", name="run", prove=False)
    wide = Batch(batch.inputs.repeat(8, 1), batch.outputs.repeat(8, 1))
    room: list[int | None] = []
    for n_wanted in (20, 20, 20, 100, 100, 100, 100, 100):
        step.n_wanted = n_wanted
        choice(transcoder, wide, OBJECTIVE)
        room.append(step.n_slots)
    assert room == [None, None, 64, 64, 64, 256, 256, 256]
    said = (
        "run: a step had 100 candidate pairs and room for 64; it changed no weight, and there is more room from now on"
    )
    assert [record.message for record in caplog.records] == [said, said]


def test_a_smaller_batch_in_between_takes_no_room_away(caplog: pytest.LogCaptureFixture) -> None:
    transcoder, _, _, batch = small_step()
    step = CountedStep()
    choice = DeviceChoice(step, "float32", name="run", prove=False)
    wide = Batch(batch.inputs.repeat(8, 1), batch.outputs.repeat(8, 1))
    room: list[int | None] = []
    most = 40 * 12
    for n_wanted, rows in ((160, wide), (160, wide), (20, batch), (160, wide), (160, wide), (160, wide)):
        step.n_wanted = n_wanted
        choice(transcoder, rows, OBJECTIVE)
        room.append(step.n_slots)
    assert room == [None, None, 60, most, most, most]
    assert not caplog.records


def test_a_penalty_begins_dense_and_goes_sparse_two_steps_after_few_features_fire() -> None:
    transcoder = with_random_weights(ReLU(l1=0.1).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(CountedStep(), "float32", name="run")
    choice.choice = "sparse"
    taken = []
    for shift in (0, -9, 0, 0, 18, 0, 0):
        with torch.no_grad():
            transcoder.b_enc.add_(shift)
        choice(transcoder, batch, OBJECTIVE)
        taken.append(choice.is_sparse)
    assert taken == [False, False, False, True, True, True, False]


@pytest.mark.parametrize(("error", "kind"), [(1e-6, "sparse"), (0.1, "dense")])
def test_the_proof_decides_once_and_a_wrong_step_is_reported(
    error: float, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = "tailrace.training.kernels.device.choice"
    proofs: list[float] = []

    def prove(*_: Any) -> float:
        proofs.append(error)
        return error

    monkeypatch.setattr(f"{module}.largest_error", prove)
    monkeypatch.setattr(f"{module}._microseconds", lambda step, *_: 1000 if isinstance(step, DeviceStep) else 2000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU of a test")
    transcoder = with_random_weights(TopK(k=2).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(CountedStep(), "bfloat16", name="run")
    with caplog.at_level(logging.INFO):
        choice(transcoder, batch, OBJECTIVE)
        choice(transcoder, batch, OBJECTIVE)
    assert (choice.choice, choice.gradients.trusted, len(proofs)) == (kind, kind == "sparse", 1)
    said = "steps are sparse: the sparse one is right to 1e-06 and takes 1.00 ms, the dense one takes 2.00 ms"
    report = (
        "failed its proof (its numbers differ from those of the dense step by 1.0e-01). Please report this, with GPU"
    )
    assert (said if kind == "sparse" else report) in caplog.text
    resumed = DeviceChoice(CountedStep(), "bfloat16", name="run")
    resumed.load_state(json.loads(json.dumps(choice.state())))
    resumed(transcoder, batch, OBJECTIVE)
    assert (resumed.choice, resumed.gradients.trusted, len(proofs)) == (kind, kind == "sparse", 1)


class UncompiledStep(CountedStep):
    """A step whose programs the compiler refuses."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
            "ptxas fatal   : Value 'sm_52' is not defined for option 'gpu-name'\n\nRepro command: ptxas -lineinfo a.ptx"
        )


def test_a_step_that_does_not_compile_is_reported_once_and_steps_are_dense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU of a test")
    transcoder = with_random_weights(TopK(k=2).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(UncompiledStep(), "float32", name="run")
    for _ in range(2):
        choice(transcoder, batch, OBJECTIVE)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    said = "failed its proof (RuntimeError: ptxas fatal   : Value 'sm_52' is not defined for option 'gpu-name')"
    assert said in record.getMessage()
    assert choice.choice == "dense"


def test_a_step_that_was_asked_for_and_does_not_compile_is_refused() -> None:
    transcoder = with_random_weights(TopK(k=2).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(UncompiledStep(), "float32", name="run", prove=False)
    with pytest.raises(SettingsError, match=r"kernel: sparse: .* \(RuntimeError: ptxas fatal .*; use auto or dense"):
        choice(transcoder, batch, OBJECTIVE)


@pytest.mark.parametrize("said", ["CUDA error: unspecified launch failure", "CUDA out of memory"])
def test_what_the_device_says_of_a_first_step_is_no_fault_of_the_kernel(said: str) -> None:
    class Failing(CountedStep):
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError(said)

    transcoder = with_random_weights(TopK(k=2).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(Failing(), "float32", name="run", prove=False)
    with pytest.raises(RuntimeError, match=said):  # which the command turns into advice
        choice(transcoder, batch, OBJECTIVE)


class TooLargeStep(CountedStep):
    """A step that the memory does not hold."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_step_that_fits_into_memory_is_taken_and_there_is_nothing_to_report(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = "tailrace.training.kernels.device.choice"
    monkeypatch.setattr(f"{module}.largest_error", lambda *_: 1e-6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    transcoder = with_random_weights(TopK(k=2).build(4, 3, 120)).float()
    _, _, _, batch = small_step()
    choice = DeviceChoice(CountedStep() if kind == "sparse" else TooLargeStep(), "float32", name="run")
    if kind == "sparse":
        choice._dense = TooLargeStep()
    with caplog.at_level(logging.INFO):
        choice(transcoder, batch, OBJECTIVE)
    assert choice.choice == kind
    assert f"steps are {kind}" in caplog.text
    assert f"the {'dense one' if kind == 'sparse' else 'sparse one is right to 1e-06 and'} does not fit" in caplog.text
    assert "report" not in caplog.text
