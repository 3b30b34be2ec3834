"""The benchmark of a training step: its rows have the L0 it claims, its contenders answer, its ratios are right."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.planted_rows import Problem, firing_frequencies, load, plant, save
from benchmarks.step_processes import ContenderFailedError, Side, StepProcess
from benchmarks.step_server import Task
from benchmarks.train_step import COUNTED, OURS, Family, Size, add_ratios, start_report
from benchmarks.train_step_reference import L1, ReferenceStep

SMALL = Problem(width=32, d_sae=128, l0=6, batch_rows=256, n_batches=2)
FLOOR = "train_step_floor.py"


def test_planted_rows_have_the_l0_asked_for() -> None:
    planted = plant(SMALL)
    fires = (planted.inputs @ planted.encoder.T > planted.threshold).sum(-1).double().mean(1)
    # the threshold was found on the first batch, so that one is exact but for ties
    assert float(fires[0]) == pytest.approx(6, abs=0.01)
    assert float(fires[1]) == pytest.approx(6, rel=0.1)


def test_planted_rows_have_the_norm_of_normalised_activations() -> None:
    planted = plant(SMALL)
    for rows in (planted.inputs, planted.outputs):
        assert float(rows.pow(2).sum(-1).mean()) == pytest.approx(SMALL.width, rel=1e-4)


def test_firing_frequencies_sum_to_l0_and_leave_room_for_chance() -> None:
    frequencies = firing_frequencies(np.random.Generator(np.random.Philox(0)), 500, 40)
    assert frequencies.sum() == pytest.approx(40, rel=1e-3)
    assert 0 < frequencies.min() < frequencies.max() <= 0.5


def test_planted_rows_survive_the_disk(tmp_path: Path) -> None:
    planted = plant(SMALL)
    save(planted, SMALL, tmp_path)
    again, problem = load(tmp_path)
    assert problem == SMALL
    assert again.threshold == planted.threshold
    for name in ("inputs", "outputs", "encoder", "decoder"):
        assert torch.equal(getattr(again, name), getattr(planted, name))


def test_the_reference_leaves_no_gradient_along_decoder_rows() -> None:
    planted = plant(SMALL)
    stepper = ReferenceStep(Task("relu", "float32", SMALL, planted))
    before = stepper._W_dec.detach().clone()
    stepper.step(planted.inputs[0], planted.outputs[0])
    gradient = stepper._W_dec.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0
    assert float((gradient * before).sum(1).abs().max()) < 1e-6 * float(gradient.norm())


def test_the_reference_minimises_the_formula_of_the_original() -> None:
    planted = plant(SMALL)
    inputs, outputs = planted.inputs[0], planted.outputs[0]
    stepper = ReferenceStep(Task("relu", "float32", SMALL, planted))
    stepper.step(inputs, outputs)
    b_enc = torch.full((SMALL.d_sae,), -planted.threshold, dtype=torch.float64, requires_grad=True)
    acts = (inputs.double() @ planted.encoder.double().T + b_enc).relu()
    error = (acts @ planted.decoder.double() - outputs.double()) ** 2 / outputs.double().norm(dim=1)[:, None]
    (error.sum() / error.numel() + L1 * acts.sum() / len(acts)).backward()
    assert stepper._b_enc.grad is not None
    assert b_enc.grad is not None
    torch.testing.assert_close(stepper._b_enc.grad.double(), b_enc.grad, rtol=1e-4, atol=1e-8)


def test_a_contender_takes_steps_when_told(tmp_path: Path) -> None:
    save(plant(SMALL), SMALL, tmp_path)
    with StepProcess(Side("product", FLOOR, sys.executable), "relu", "float32", tmp_path) as process:
        turn = process.take(3)
    assert process.name == "product, float32"
    assert process.l0 == pytest.approx(6, abs=0.01)
    assert process.versions == {"torch": torch.__version__}
    assert turn.cpu_seconds > 0
    assert turn.wall_seconds > 0


@pytest.mark.slow
def test_a_contender_that_cannot_run_says_why(tmp_path: Path) -> None:
    save(plant(SMALL), SMALL, tmp_path)
    with (
        pytest.raises(ContenderFailedError, match="KeyError: 'int3'"),
        StepProcess(Side("product", FLOOR, sys.executable), "relu", "int3", tmp_path),
    ):
        pass


def test_ratios_are_over_the_fastest_mode_of_each_side(tmp_path: Path) -> None:
    size = Size(SMALL, rounds=3, steps=1)
    family = Family("batch_topk", size)
    family.cpu.by_name = {
        f"{OURS.name}, {COUNTED}": [10.0, 20.0, 40.0],
        "SAELens, float32": [1.0, 1.0, 1.0],
        "SAELens, bfloat16": [2.0, 5.0, 4.0],
        "dictionary_learning, float32": [2.0, 2.0, 2.0],
        "encoder product alone, float32": [20.0, 40.0, 80.0],
        "encoder product alone, bfloat16": [40.0, 80.0, 160.0],
    }
    modes = [("SAELens", "float32"), ("SAELens", "bfloat16"), ("dictionary_learning", "float32")]
    family.processes = [StepProcess(Side(name, ""), "batch_topk", mode, tmp_path) for name, mode in modes]
    report = start_report(size)
    add_ratios(report, family)
    assert report.ratios == {
        "batch_topk_vs_saelens_128": 5.0,  # of 5, 4 and 10
        "batch_topk_vs_dictionary_learning_128": 10.0,
        "batch_topk_vs_dictionary_learning_as_offered_128": 10.0,
        "batch_topk_over_float32_product_128": 2.0,
        "batch_topk_over_bfloat16_product_128": 4.0,
    }
    assert report.targets["batch_topk_vs_saelens_128"] == "≥ 5"
