"""Loss terms for dead features: the original code's numbers, their gradients, and the same under both kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import ReLU, TopK
from tailrace.training.architectures.base import Trace, Transcoder
from tailrace.training.architectures.entries import DenseEntries
from tailrace.training.architectures.objectives import Objective, ReferenceObjective, VarianceObjective
from tailrace.training.dead_features.auxiliary import Auxiliary, AuxK, Ghost
from tailrace.training.dead_features.auxiliary.auxk import AuxKLoss
from tailrace.training.dead_features.auxiliary.ghost import GhostLoss
from tailrace.training.dead_features.auxiliary.settings import Rescale
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import ExtraLoss
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch
from tests.training.architectures.test_architectures import (
    GOLDEN,
    SMALL,
    close,
    random_tensor,
    random_transcoder,
    reference_transcoder,
)

BOTH: list[Auxiliary] = [Ghost(), Ghost(ghost_rescale="elementwise"), AuxK(aux_k=2), AuxK()]


def record(d_sae: int, dead: list[int]) -> FiringRecord:
    """Return a record in which features ``dead`` have not fired for 5 steps."""
    firing = FiringRecord(d_sae)
    firing.steps_since_fired[dead] = 5
    return firing


def build(auxiliary: Auxiliary, firing: FiringRecord, objective: Objective) -> ExtraLoss:
    loss = auxiliary.build(firing, objective, dead_after_steps=5)
    assert loss is not None
    return loss


def trace_of(transcoder: Transcoder, batch: Batch, objective: Objective) -> Trace:
    entries = DenseEntries(transcoder.pre_activations(batch.inputs), transcoder.selection())
    return transcoder.trace(entries, batch, objective)


@pytest.mark.parametrize(("rescale", "value"), [("elementwise", 2.2349610), ("scalar", 2.2349615)])
def test_ghost_loss_of_the_right_residual_has_the_golden_value(rescale: Rescale, value: float) -> None:
    transcoder = reference_transcoder().double()
    batch = Batch(GOLDEN.inputs.double(), GOLDEN.outputs.double())
    loss = build(Ghost(ghost_rescale=rescale), record(3, [2]), ReferenceObjective())
    found = loss(transcoder, batch, trace_of(transcoder, batch, ReferenceObjective()))["ghost"]
    assert float(found.detach()) == pytest.approx(value, abs=2e-7)


def test_ghost_loss_and_gradients_are_the_original_codes_when_given_its_residual() -> None:
    # its residual was the input less the output; everything else about the term is the same
    transcoder = reference_transcoder()
    trace = trace_of(transcoder, GOLDEN, ReferenceObjective())
    loss = GhostLoss(record(3, [2]), 5, ReferenceObjective(), "elementwise")
    dead = torch.tensor([2])
    residual = (GOLDEN.inputs - trace.outputs).detach()
    ghost = loss.term(loss.write(transcoder, dead, GOLDEN.inputs), residual, GOLDEN, trace)
    assert float(ghost.detach()) == pytest.approx(2.2349591, abs=1e-6)
    (ghost + trace.terms["reconstruction"] + trace.terms["sparsity"]).backward()
    assert transcoder.W_dec.grad is not None
    assert close(transcoder.W_dec.grad[2], [2.69861, 2.169065])
    assert transcoder.W_enc.grad is not None
    assert close(transcoder.W_enc.grad[2], [2.987536, 0.82739])
    assert transcoder.b_dec is not None
    assert close(transcoder.b_dec.grad, [-2.253993, 2.844985])


def test_auxk_loss_has_the_value_computed_by_hand() -> None:
    # Residuals (2, 0) and (0, 2), mean (1, 1): squared distances from it sum to 4. Features 1 and 2 are dead and write
    # (1, 0) and (0, 1); pre-activations are (3, -1) and (1, -2), so k = 1 keeps the first of each row.
    transcoder = ReLU(input_bias=False).build(2, 2, 3)
    with torch.no_grad():
        transcoder.W_enc.copy_(torch.tensor([[-1.0, -1.0], [3.0, 1.0], [-1.0, -2.0]]))
        transcoder.W_dec.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    pre = torch.tensor([[3.0, -1.0], [1.0, -2.0]])
    residual = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    batch = Batch(torch.eye(2), residual)
    assert torch.equal(transcoder.pre_activations_of(torch.tensor([1, 2]), batch.inputs), pre)
    trace = Trace(torch.zeros(2, 2), torch.zeros(2, 3), {})
    for k, error in ((1, (2 - 3) ** 2 + 1 + 2**2), (2, (2 - 3) ** 2 + 1 + 1 + (2 + 2) ** 2)):
        term = AuxKLoss(record(3, [1, 2]), 5, k=k, coefficient=1 / 32)(transcoder, batch, trace)
        assert float(term["auxk"].detach()) == pytest.approx(error / 4 / 32)


def test_auxk_of_a_residual_that_does_not_vary_is_zero_and_not_nan() -> None:
    loss = AuxKLoss(record(3, [1]), 5, k=1, coefficient=1.0)
    trace = Trace(torch.zeros(2, 2), torch.zeros(2, 3), {})
    transcoder = random_transcoder(ReLU(), 2, 2, 3).float()
    term = loss(transcoder, Batch(torch.eye(2), torch.ones(2, 2)), trace)["auxk"]
    term.backward()
    assert float(term.detach()) == 0.0
    assert transcoder.W_dec.grad is not None
    assert bool(torch.isfinite(transcoder.W_dec.grad).all())


def numerical_gradient(value: Callable[[], Tensor], parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter)
    with torch.no_grad():
        flat, found = parameter.view(-1), gradient.view(-1)
        for index in range(len(flat)):
            before = float(flat[index])
            flat[index] = before + 1e-6
            above = float(value())
            flat[index] = before - 1e-6
            found[index] = (above - float(value())) / 2e-6
            flat[index] = before
    return gradient


def problem() -> tuple[Transcoder, Batch, Trace]:
    """Return a float64 module, 6 rows and its trace; the term's own gradients are wanted, so the trace has none."""
    transcoder = random_transcoder(TopK(k=3, input_bias=True))
    batch = Batch(random_tensor(40, 6, 4), random_tensor(41, 6, 3))
    trace = trace_of(transcoder, batch, VarianceObjective(2.0))
    return transcoder, batch, Trace(trace.outputs.detach(), trace.activations.detach(), trace.terms)


@pytest.mark.parametrize("k", [1, 2, None])
def test_auxk_gradients_agree_with_finite_differences(k: int | None) -> None:
    transcoder, batch, trace = problem()
    loss = AuxKLoss(record(10, [1, 4, 7]), 5, k=k, coefficient=0.5)

    def value() -> Tensor:
        return loss(transcoder, batch, trace)["auxk"]

    value().backward()
    for name, parameter in transcoder.named_parameters():
        wanted = numerical_gradient(value, parameter.data)
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, wanted, atol=1e-7), name


@pytest.mark.parametrize("rescale", ["scalar", "elementwise"])
def test_ghost_gradients_agree_with_finite_differences_where_its_scales_are_held(rescale: Rescale) -> None:
    transcoder, batch, trace = problem()
    dead = torch.tensor([1, 4, 7])
    GhostLoss(record(10, dead.tolist()), 5, VarianceObjective(2.0), rescale)(transcoder, batch, trace)[
        "ghost"
    ].backward()
    residual = batch.outputs - trace.outputs
    norms = residual.norm(dim=1, keepdim=True)

    def ghosts() -> Tensor:
        return transcoder.pre_activations_of(dead, batch.inputs).exp() @ transcoder.W_dec[dead]

    with torch.no_grad():
        scale = norms / (1e-6 + 2 * ghosts().norm(dim=1, keepdim=True))
        before = (ghosts() * scale - residual) ** 2 / norms
        errors = (trace.outputs - batch.outputs) ** 2 * 3 / 2.0
        factor = errors.mean() / (before.mean() + 1e-6) if rescale == "scalar" else errors / (before + 1e-6)

    def value() -> Tensor:
        return ((ghosts() * scale - residual) ** 2 / norms * factor).mean()

    for name, parameter in transcoder.named_parameters():
        wanted = numerical_gradient(value, parameter.data)
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, wanted, atol=1e-6), name


@pytest.mark.parametrize("auxiliary", BOTH, ids=str)
def test_only_dead_features_get_a_gradient_from_the_term(auxiliary: Auxiliary) -> None:
    transcoder, batch, trace = problem()
    (term,) = build(auxiliary, record(10, [1, 4, 7]), VarianceObjective(2.0))(transcoder, batch, trace).values()
    term.backward()
    for parameter in (transcoder.W_enc, transcoder.W_dec, transcoder.b_enc):
        assert parameter.grad is not None
        touched = parameter.grad.reshape(10, -1).abs().sum(1) > 0
        reached = set(touched.nonzero().squeeze(1).tolist())
        # k of the dead for each row, so auxk may leave one out
        assert reached == {1, 4, 7} if isinstance(auxiliary, Ghost) else {1} < reached <= {1, 4, 7}
    assert transcoder.b_dec_out.grad is None


@pytest.mark.parametrize("auxiliary", BOTH, ids=str)
@pytest.mark.parametrize("architecture", SMALL)
def test_sparse_and_dense_steps_agree_with_an_auxiliary_loss_in_float64(
    architecture: str, auxiliary: Auxiliary
) -> None:
    d_sae, objective = 40, VarianceObjective(5.0)
    dense = random_transcoder(SMALL[architecture], 6, 5, d_sae)
    dead = list(range(0, d_sae, 3))
    with torch.no_grad():
        dense.b_enc[dead] = -8.0
    sparse = copy.deepcopy(dense)
    batch = Batch(random_tensor(70, 30, 6), random_tensor(71, 30, 5))
    loss = build(auxiliary, record(d_sae, dead), objective)
    wanted = DenseStep()(dense, batch, objective, [loss])
    kernel = SparseStep()
    for _ in range(2):  # the second time .grad is memory used before
        found = kernel(sparse, batch, objective, [loss])
    assert float(found.losses["loss"]) == pytest.approx(float(wanted.losses["loss"]), rel=1e-12)
    assert wanted.losses.keys() == found.losses.keys()
    assert {"ghost", "auxk"} & wanted.losses.keys()
    for (name, mine), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-11, atol=1e-13), name
    without = copy.deepcopy(dense)
    DenseStep()(without, batch, objective)
    assert not torch.allclose(without.W_dec.grad[dead], dense.W_dec.grad[dead])  # type: ignore[index]


def test_there_is_no_term_while_no_feature_is_dead() -> None:
    # the original code looked at its mask before checking that there was one
    transcoder, batch, trace = problem()
    for auxiliary in BOTH:
        assert build(auxiliary, record(10, []), VarianceObjective(2.0))(transcoder, batch, trace) == {}


def test_inputs_and_outputs_may_differ_in_width() -> None:
    # the original's residual was of the input, so it failed here
    transcoder, batch, trace = problem()
    assert batch.inputs.shape[1] != batch.outputs.shape[1]
    loss = build(Ghost(), record(10, [1]), VarianceObjective(2.0))
    assert math.isfinite(float(loss(transcoder, batch, trace)["ghost"].detach()))


def test_a_huge_pre_activation_leaves_the_ghost_loss_finite() -> None:
    transcoder, batch, trace = problem()
    transcoder, batch = transcoder.float(), Batch(batch.inputs.float(), batch.outputs.float())
    with torch.no_grad():
        transcoder.b_enc[1] = 500.0
    loss = build(Ghost(), record(10, [1, 4]), VarianceObjective(2.0))
    term = loss(transcoder, batch, Trace(trace.outputs.float(), trace.activations, trace.terms))["ghost"]
    term.backward()
    assert math.isfinite(float(term.detach()))
    assert all(bool(torch.isfinite(p.grad).all()) for p in transcoder.parameters() if p.grad is not None)


def test_settings_of_one_term_are_refused_for_another() -> None:
    with pytest.raises(SettingsError, match="aux_k: is no setting of ghost"):
        TrainSettings.read({"auxiliary": {"kind": "ghost", "aux_k": 3}})
