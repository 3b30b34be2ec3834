"""Every architecture: gradients, constraints, folding; and the numbers of the original transcoder code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from tailrace.training.architectures import (
    ARCHITECTURES,
    Architecture,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
)
from tailrace.training.architectures.base import Float32Product, Transcoder
from tailrace.training.architectures.batch_topk import BatchTopKTranscoder
from tailrace.training.architectures.entries import Above, DenseEntries
from tailrace.training.architectures.gated import GatedTranscoder
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.objectives import Objective, ReferenceObjective, VarianceObjective
from tailrace.training.architectures.relu import ReLUTranscoder
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.initialise import FeatureSlice, initialise, random_directions
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.normalisation import Normalisation

SMALL: dict[str, Architecture] = {
    "relu": ReLU(l1=0.3),
    "topk": TopK(k=3),
    "batch_topk": BatchTopK(k=3),
    "jumprelu": JumpReLU(l0=0.1, bandwidth=0.5),
    "gated": Gated(l1=0.3),
    "matryoshka": Matryoshka(k=3, levels=2),
}
"""Settings of each kind that suit a handful of features."""


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(generator(seed).standard_normal(shape))


def random_transcoder(architecture: Architecture, d_in: int = 4, d_out: int = 3, d_sae: int = 10) -> Transcoder:
    """Return a float64 module with random weights everywhere and unit decoder rows."""
    transcoder = architecture.build(d_in, d_out, d_sae).double()
    with torch.no_grad():
        for index, parameter in enumerate(transcoder.parameters()):
            parameter.copy_(random_tensor(index, *parameter.shape))
    transcoder.constrain_parameters()
    return transcoder


def reference_transcoder() -> Transcoder:
    """Return the golden case's module; the original code stores the encoder as (d_in, d_sae)."""
    transcoder = ReLU(l1=0.1, input_bias=True).build(2, 2, 3)
    weights = {
        "W_enc": torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -1.0]]).T,
        "b_enc": torch.tensor([0.1, 0.0, -0.2]),
        "W_dec": torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]]),
        "b_dec": torch.tensor([0.5, -0.5]),
        "b_dec_out": torch.tensor([0.2, -0.1]),
    }
    transcoder.load_state_dict(weights)
    return transcoder


GOLDEN = Batch(torch.tensor([[1.0, 1.0], [2.0, -1.0]]), torch.tensor([[3.0, 4.0], [0.0, -2.0]]))


def close(found: Tensor | None, wanted: list[list[float]] | list[float]) -> bool:
    assert found is not None
    return torch.allclose(found, torch.tensor(wanted), atol=1e-5)


@pytest.mark.parametrize("kernel", [DenseStep, SparseStep])
def test_a_tied_autoencoder_has_the_originals_loss_and_gradients(kernel: type[DenseStep] | type[SparseStep]) -> None:
    """One bias, taken off the inputs and added to the outputs, written out as the original code computes it."""
    coder = random_transcoder(ReLU(l1=0.3, tied_bias=True), 6, 6, 20)
    rows = random_tensor(90, 40, 6)
    W_enc, b_enc, W_dec, b_dec = (
        value.detach().clone().requires_grad_() for value in (coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec_out)
    )
    acts = ((rows - b_dec) @ W_enc.T + b_enc).relu()
    errors = (acts @ W_dec + b_dec - rows) ** 2 / rows.norm(dim=1, keepdim=True)
    loss = errors.mean() + 0.3 * acts.sum(1).mean()
    loss.backward()
    found = kernel()(coder, Batch(rows, rows), ReferenceObjective())
    assert [name for name, _ in coder.named_parameters()] == ["W_enc", "b_enc", "W_dec", "b_dec_out"]
    assert float(found.losses["loss"]) == pytest.approx(loss.item(), rel=1e-12)
    for mine, theirs in zip(coder.parameters(), (W_enc, b_enc, W_dec, b_dec), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_a_tied_autoencoder_is_folded_and_taken_up_again() -> None:
    architecture = ReLU(tied_bias=True)
    coder = random_transcoder(architecture, 6, 6, 20)
    mean = torch.full((6,), 0.5, dtype=torch.float64)
    units = Normalisation(mean, 2.0, mean, 2.0)
    rows = random_tensor(91, 40, 6)
    raw = coder.folded(units)
    assert not raw.tied_bias
    torch.testing.assert_close(units.outputs(raw(rows)), coder(units.inputs(rows)))
    again = random_transcoder(architecture, 6, 6, 20)
    again.take_folded(raw, units)
    torch.testing.assert_close(again(rows), coder(rows))
    chosen = torch.tensor([3, 7])
    torch.testing.assert_close(coder.pre_activations_of(chosen, rows), coder.pre_activations(rows)[:, chosen])


def test_a_later_setting_is_recorded_only_where_it_is_used() -> None:
    assert "tied_bias" not in ReLU().model_dump(mode="json")
    assert ReLU(tied_bias=True).model_dump(mode="json")["tied_bias"] is True
    assert "tied_bias" not in TrainSettings(architecture=ReLU()).model_dump(mode="json")["architecture"]
    assert TrainSettings.read(TrainSettings(architecture=ReLU(tied_bias=True)).model_dump()).architecture == ReLU(
        tied_bias=True
    )


def test_every_architecture_is_in_the_table_of_small_settings() -> None:
    assert {type(architecture) for architecture in SMALL.values()} == set(ARCHITECTURES)


def test_forward_pass_agrees_with_the_original_code() -> None:
    transcoder = reference_transcoder()
    assert close(transcoder.pre_activations(GOLDEN.inputs), [[0.6, 2.5, -1.45], [1.6, -2.5, 1.05]])
    assert close(transcoder.encode(GOLDEN.inputs), [[0.6, 2.5, 0.0], [1.6, 0.0, 1.05]])
    assert close(transcoder(GOLDEN.inputs), [[0.56, 2.88], [2.21, 1.18]])


def test_losses_agree_with_the_original_code() -> None:
    losses = DenseStep()(reference_transcoder(), GOLDEN, ReferenceObjective()).losses
    assert float(losses["reconstruction"]) == pytest.approx(2.2349625, abs=1e-5)
    assert float(losses["sparsity"]) == pytest.approx(0.2875, abs=1e-6)
    assert float(losses["loss"]) == pytest.approx(2.5224624, abs=1e-5)


def test_gradients_agree_with_the_original_code() -> None:
    transcoder = reference_transcoder()
    DenseStep()(transcoder, GOLDEN, ReferenceObjective())
    assert close(transcoder.W_dec.grad, [[0.7376, 1.2048], [-0.61, -0.28], [0.580125, 0.83475]])
    assert transcoder.W_enc.grad is not None
    assert close(transcoder.W_enc.grad.T, [[1.43325, -0.031, 0.90375], [-0.78775, -0.093, -0.30125]])
    assert transcoder.b_dec is not None
    assert close(transcoder.b_dec.grad, [-1.19475, 0.7265])
    assert close(transcoder.b_dec_out.grad, [0.3085, 0.683])


def test_parallel_gradient_is_removed_as_in_the_original_code() -> None:
    transcoder = reference_transcoder()
    DenseStep()(transcoder, GOLDEN, ReferenceObjective())
    transcoder.constrain_gradients()
    # row 2 is the unit vector (1, 0), so of (0.580125, 0.83475) only the second part stays
    assert close(transcoder.W_dec.grad, [[-0.10624, 0.07968], [-0.61, 0.0], [0.0, 0.83475]])


def test_a_target_of_zero_gives_a_finite_reference_loss() -> None:
    zero = Batch(GOLDEN.inputs, torch.zeros(2, 2))
    assert torch.isfinite(DenseStep()(reference_transcoder(), zero, ReferenceObjective()).losses["loss"])


def test_variance_loss_is_one_for_predicting_the_mean() -> None:
    # variance of the columns (1, -1) and (2, -2) about their mean 0: 1 + 4
    targets = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert float(VarianceObjective(5.0).reconstruction(torch.zeros(2, 2), targets)) == 1.0


def test_variance_loss_and_l1_do_not_depend_on_the_scale_of_the_outputs() -> None:
    transcoder = random_transcoder(SMALL["relu"])
    transcoder.activation_unit = VarianceObjective(3.0).activation_unit
    inputs, targets = random_tensor(20, 8, 4), random_tensor(21, 8, 3)
    found = DenseStep()(transcoder, Batch(inputs, targets), VarianceObjective(3.0)).losses
    with torch.no_grad():  # a transcoder whose activations and outputs are ten times as large
        for parameter in (transcoder.W_enc, transcoder.b_enc, transcoder.b_dec_out):
            parameter.mul_(10)
    transcoder.activation_unit = VarianceObjective(300.0).activation_unit
    scaled = DenseStep()(transcoder, Batch(inputs, 10 * targets), VarianceObjective(300.0)).losses
    assert {name: float(value) for name, value in scaled.items()} == pytest.approx(
        {name: float(value) for name, value in found.items()}
    )


def test_l1_is_summed_over_features_and_averaged_over_all_rows() -> None:
    transcoder = ReLU(l1=2.0).build(2, 2, 3)
    entries = DenseEntries(torch.ones(4, 3), transcoder.selection())
    assert float(transcoder.penalties(entries, transcoder.activation(entries))["sparsity"]) == 2.0 * 3


def test_topk_keeps_the_k_largest_positive_pre_activations() -> None:
    transcoder = TopK(k=2).build(1, 1, 4)
    pre_activations = torch.tensor([[0.5, 3.0, -9.0, 2.0], [-1.0, -2.0, 0.25, -3.0]])
    assert transcoder.activate(pre_activations).tolist() == [[0.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.25, 0.0]]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


NOT_BY_SLOPE = {("jumprelu", "log_threshold")}
"""Parameters that learn by a straight-through estimate, which is not the slope of the loss."""
HELD_FIXED = {("gated", "W_dec"): "gate", ("gated", "b_dec_out"): "gate"}
"""Loss terms in which a parameter counts as a constant."""


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("objective", [VarianceObjective(2.5), ReferenceObjective()], ids=["variance", "reference"])
def test_gradients_agree_with_finite_differences(kind: str, objective: Objective) -> None:
    transcoder = random_transcoder(SMALL[kind], d_sae=100 if kind == "topk" else 10)
    batch = Batch(random_tensor(40, 6, 4), random_tensor(41, 6, 3))
    step = DenseStep()
    step(transcoder, batch, objective)
    gradients = {name: _gradient(parameter).clone() for name, parameter in transcoder.named_parameters()}
    for index, (name, parameter) in enumerate(transcoder.named_parameters()):
        if (kind, name) in NOT_BY_SLOPE:
            continue
        direction = random_tensor(50 + index, *parameter.shape)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            found = step(transcoder, batch, objective).losses
            constant = HELD_FIXED.get((kind, name))
            losses.append(float(found["loss"]) - (float(found[constant]) if constant else 0.0))
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        wanted = float((gradients[name] * direction).sum())
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(wanted, rel=1e-5, abs=1e-8), name


def test_jumprelu_thresholds_learn_by_the_straight_through_estimate() -> None:
    # one feature, threshold 1, bandwidth 0.5: of pre-activations 0.9, 1.2, 3 the first two lie within 0.25 of it
    transcoder = JumpReLU(l0=0.1, bandwidth=0.5).build(1, 1, 1).double()
    with torch.no_grad():
        transcoder.W_enc.fill_(1)
        transcoder.W_dec.fill_(1)
    batch = Batch(torch.tensor([[0.9], [1.2], [3.0]]).double(), torch.tensor([[1.0], [1.0], [1.0]]).double())
    DenseStep()(transcoder, batch, VarianceObjective(1.0))
    # outputs 0, 1.2, 3; slope of the mean squared error to them 2/3 · (−1, 0.2, 2); the activation's estimate is
    # −θ/ε = −2 and that of l0 · mean L0 is −0.1/3 · 1/ε, on each of the two rows; d θ / d log θ = θ = 1
    wanted = -2 * 2 / 3 * (-1 + 0.2) - 2 * 0.1 / 3 / 0.5
    assert isinstance(transcoder, JumpReLUTranscoder)
    assert transcoder.log_threshold.grad is not None
    assert float(transcoder.log_threshold.grad) == pytest.approx(wanted)


def test_l0_target_penalises_the_squared_distance_from_it() -> None:
    transcoder = JumpReLU(l0=2.0, target_l0=4.0).build(2, 2, 3)
    # thresholds are exp(0) = 1, so six of twelve fire: mean L0 1.5, and 2 · (1.5 / 4 − 1)²
    entries = DenseEntries(torch.tensor([[2.0, 0.5, 2.0], [0.5, 2.0, 0.5]] * 2), transcoder.selection())
    found = transcoder.penalties(entries, transcoder.activation(entries))["sparsity"]
    assert float(found.detach()) == pytest.approx(2.0 * (1.5 / 4 - 1) ** 2)


def test_tanh_penalty_saturates_for_strong_activations() -> None:
    transcoder = ReLU(l1=1.0, tanh_scale=2.0).build(2, 2, 2)
    transcoder.activation_unit = 0.5
    entries = DenseEntries(torch.tensor([[0.25, -1.0], [100.0, 0.0]]), transcoder.selection())
    found = transcoder.penalties(entries, transcoder.activation(entries))["sparsity"]
    # in units of 0.5 the activations are 0.5 and 200: tanh(1)/2 and 1/2, over two rows
    assert float(found) == pytest.approx((math.tanh(1.0) / 2 + 0.5) / 2)


def test_batch_topk_takes_the_largest_of_the_whole_batch_and_remembers_its_threshold() -> None:
    transcoder = BatchTopK(k=1).build(1, 1, 3)
    entries = DenseEntries(torch.tensor([[5.0, 4.0, 1.0], [0.5, 0.25, -1.0]]), transcoder.selection())
    activations = transcoder.activation(entries)
    assert activations.tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    transcoder.end_step(activations)
    assert transcoder.activate(torch.tensor([[4.5, 4.0, 1.0]])).tolist() == [[4.5, 0.0, 0.0]]  # above 4
    transcoder.end_step(torch.tensor([[6.0, 0.0, 0.0]]))
    assert isinstance(transcoder, BatchTopKTranscoder)
    assert float(transcoder.threshold) == pytest.approx(0.9 * 4 + 0.1 * 6)


def test_gates_open_features_and_magnitudes_say_how_far() -> None:
    transcoder = Gated(l1=1.0).build(1, 1, 3)
    assert isinstance(transcoder, GatedTranscoder)
    with torch.no_grad():
        transcoder.r_mag.copy_(torch.tensor([0.0, math.log(2.0), 0.0]))
        transcoder.b_mag.copy_(torch.tensor([0.5, 0.0, -9.0]))
    assert transcoder.activate(torch.tensor([[1.0, 3.0, 2.0], [-0.25, -1.0, 1.0]])).tolist() == [
        [1.5, 6.0, 0.0],
        [0.0, 0.0, 0.0],
    ]


def test_matryoshka_averages_the_loss_over_its_nested_dictionaries() -> None:
    transcoder = Matryoshka(k=2, levels=2).build(2, 1, 2)
    with torch.no_grad():
        transcoder.W_enc.copy_(torch.eye(2))
        transcoder.W_dec.fill_(1.0)
    found = DenseStep()(transcoder, Batch(torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0]])), VarianceObjective(1.0))
    # the first feature alone gives 2, both give 3: errors 4 and 1
    assert float(found.losses["reconstruction"]) == pytest.approx((4 + 1) / 2)
    assert found.outputs.tolist() == [[3.0]]


def test_skip_path_adds_a_linear_map_of_the_inputs() -> None:
    transcoder = random_transcoder(TopK(k=2, skip=True))
    assert transcoder.W_skip is not None
    inputs = random_tensor(90, 5, 4)
    features = transcoder.encode(inputs) @ transcoder.W_dec + transcoder.b_dec_out
    assert torch.allclose(transcoder(inputs), features + inputs @ transcoder.W_skip.T, atol=1e-12)
    with pytest.raises(ValueError, match="skip path"):
        transcoder.decode(transcoder.encode(inputs))


def test_k_moves_in_a_straight_line_from_its_start() -> None:
    settings = TopK(k=10, k_start=30, k_warmup_steps=4)
    assert [settings.k_in(step) for step in range(6)] == [30, 25, 20, 15, 10, 10]


def test_l1_rises_over_its_warmup() -> None:
    transcoder = ReLU(l1=0.4, l1_warmup_steps=4).build(2, 2, 2)
    assert isinstance(transcoder, ReLUTranscoder)
    seen = []
    for step in range(5):
        transcoder.begin_step(step)
        seen.append(transcoder.l1)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("kind", SMALL)
def test_firing_counts_are_the_rows_on_which_a_feature_is_positive(kind: str) -> None:
    transcoder = random_transcoder(SMALL[kind])
    inputs = random_tensor(60, 9, 4)
    result = DenseStep()(transcoder, Batch(inputs, random_tensor(61, 9, 3)), VarianceObjective(3.0))
    entries = DenseEntries(transcoder.pre_activations(inputs), transcoder.selection())
    assert torch.equal(result.n_active, (transcoder.activation(entries) > 0).sum(0))
    assert int(result.n_active.sum()) > 0


NORMALISATION = Normalisation(10 * random_tensor(70, 4), 7.0, 3 * random_tensor(71, 3), 0.2)


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("kind", SMALL)
def test_folded_transcoder_does_on_raw_rows_what_training_did_on_normalised_ones(kind: str, skip: bool) -> None:
    transcoder = random_transcoder(SMALL[kind].model_copy(update={"skip": skip}))
    for name, buffer in transcoder.named_buffers():
        assert name == "threshold"
        buffer.fill_(0.3)
    folded = transcoder.folded(NORMALISATION)
    raw = 7 * random_tensor(72, 20, 4) + NORMALISATION.mean_in
    wanted = NORMALISATION.restore(transcoder(NORMALISATION.inputs(raw)))
    assert torch.allclose(folded(raw), wanted, atol=1e-10)
    assert folded.b_dec is None
    assert torch.allclose(torch.linalg.vector_norm(folded.W_dec, dim=1), torch.ones(10).double())


@pytest.mark.parametrize("kind", SMALL)
def test_taking_over_a_folded_transcoder_gives_it_back(kind: str) -> None:
    architecture = SMALL[kind].model_copy(update={"skip": True, "input_bias": False})
    transcoder = random_transcoder(architecture)
    for _, buffer in transcoder.named_buffers():
        buffer.fill_(0.3)
    again = architecture.build(4, 3, 10).double()
    again.take_folded(transcoder.folded(NORMALISATION), NORMALISATION)
    for name, value in again.state_dict().items():
        assert torch.allclose(value, transcoder.state_dict()[name], atol=1e-10), name


@pytest.mark.parametrize("kind", SMALL)
def test_constraints_leave_unit_rows_and_no_gradient_along_them(kind: str) -> None:
    transcoder = random_transcoder(SMALL[kind])
    transcoder.W_dec.grad = random_tensor(80, 10, 3)
    transcoder.constrain_gradients()
    along = (transcoder.W_dec.grad * transcoder.W_dec).sum(1)
    assert torch.allclose(along, torch.zeros(10).double(), atol=1e-12)
    with torch.no_grad():
        transcoder.W_dec.mul_(3)
    transcoder.constrain_parameters()
    assert torch.allclose(torch.linalg.vector_norm(transcoder.W_dec, dim=1), torch.ones(10).double())


def test_a_decoder_row_of_zeros_stays_zero_instead_of_becoming_nan() -> None:
    transcoder = TopK(k=1).build(2, 2, 3)
    transcoder.constrain_parameters()
    assert torch.equal(transcoder.W_dec, torch.zeros(3, 2))


def test_initial_weights_are_unit_directions_tied_where_widths_agree() -> None:
    transcoder = ReLU().build(4, 4, 50)
    mean_in, mean_out = torch.arange(4.0), torch.ones(4)
    initialise(transcoder, mean_in=mean_in, mean_out=mean_out, encoder_scale=0.5, seed=3)
    assert torch.allclose(torch.linalg.vector_norm(transcoder.W_dec, dim=1), torch.ones(50))
    assert torch.equal(transcoder.W_enc, transcoder.W_dec * 0.5)
    assert transcoder.b_dec is not None
    assert torch.equal(transcoder.b_dec, mean_in)
    assert torch.equal(transcoder.b_dec_out, mean_out)


def test_initial_directions_depend_on_seed_and_purpose_alone() -> None:
    five = FeatureSlice(0, 5, 5)
    assert torch.equal(random_directions(1, "a", five, 3), random_directions(1, "a", five, 3))
    assert not torch.equal(random_directions(1, "a", five, 3), random_directions(2, "a", five, 3))
    assert not torch.equal(random_directions(1, "a", five, 3), random_directions(1, "b", five, 3))


def test_shapes_that_annotations_state_are_checked_here() -> None:
    transcoder = TopK(k=2).build(3, 4, 8)
    with pytest.raises(TypeCheckError, match="inputs"):
        transcoder.encode(torch.zeros(5, 4))
    with pytest.raises(TypeCheckError, match="activations"):
        transcoder.decode(torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="return value"):
        DenseEntries(torch.zeros(5, 8), Above()).count(torch.zeros(8, dtype=torch.bool))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_float32_product_rounds_operands_alone(batch: tuple[int, ...]) -> None:
    rows, weights = (random_tensor(seed, *batch, n, 32).float().requires_grad_() for seed, n in ((0, 20), (1, 30)))
    gradient = random_tensor(2, *batch, 20, 30).float()
    made: Tensor = Float32Product.apply(rows, weights)
    made.backward(gradient)
    exact = rows.detach().bfloat16().double() @ weights.detach().bfloat16().double().mT
    torch.testing.assert_close(made.detach().double(), exact, rtol=0, atol=1e-5)  # float32 sums of 32 products
    for operand, wanted in ((rows, gradient @ weights.detach()), (weights, gradient.mT @ rows.detach())):
        assert operand.grad is not None
        assert operand.grad.dtype is torch.float32
        # two operands and the sum rounded to 8 bits
        assert float((operand.grad - wanted).norm() / wanted.norm()) < 6e-3
