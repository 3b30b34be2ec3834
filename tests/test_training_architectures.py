"""Every architecture: gradients, constraints, folding; and the numbers of the original transcoder code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from training.architectures import ARCHITECTURES, Architecture, ReLU, TopK, Transcoder
from training.batches import Batch
from training.initialise import initialise, random_directions
from training.normalisation import Normalisation
from training.objectives import Objective, ReferenceObjective, VarianceObjective
from training.step import AutogradStep

SMALL: dict[str, Architecture] = {"relu": ReLU(l1=0.3), "topk": TopK(k=3)}
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


def test_every_architecture_is_in_the_table_of_small_settings() -> None:
    assert {type(architecture) for architecture in SMALL.values()} == set(ARCHITECTURES)


def test_forward_pass_agrees_with_the_original_code() -> None:
    transcoder = reference_transcoder()
    assert close(transcoder.pre_activations(GOLDEN.inputs), [[0.6, 2.5, -1.45], [1.6, -2.5, 1.05]])
    assert close(transcoder.encode(GOLDEN.inputs), [[0.6, 2.5, 0.0], [1.6, 0.0, 1.05]])
    assert close(transcoder(GOLDEN.inputs), [[0.56, 2.88], [2.21, 1.18]])


def test_losses_agree_with_the_original_code() -> None:
    losses = AutogradStep()(reference_transcoder(), GOLDEN, ReferenceObjective()).losses
    assert float(losses["reconstruction"]) == pytest.approx(2.2349625, abs=1e-5)
    assert float(losses["sparsity"]) == pytest.approx(0.2875, abs=1e-6)
    assert float(losses["loss"]) == pytest.approx(2.5224624, abs=1e-5)


def test_gradients_agree_with_the_original_code() -> None:
    transcoder = reference_transcoder()
    AutogradStep()(transcoder, GOLDEN, ReferenceObjective())
    assert close(transcoder.W_dec.grad, [[0.7376, 1.2048], [-0.61, -0.28], [0.580125, 0.83475]])
    assert transcoder.W_enc.grad is not None
    assert close(transcoder.W_enc.grad.T, [[1.43325, -0.031, 0.90375], [-0.78775, -0.093, -0.30125]])
    assert transcoder.b_dec is not None
    assert close(transcoder.b_dec.grad, [-1.19475, 0.7265])
    assert close(transcoder.b_dec_out.grad, [0.3085, 0.683])


def test_parallel_gradient_is_removed_as_in_the_original_code() -> None:
    transcoder = reference_transcoder()
    AutogradStep()(transcoder, GOLDEN, ReferenceObjective())
    transcoder.constrain_gradients()
    # row 2 is the unit vector (1, 0), so of (0.580125, 0.83475) only the second part stays
    assert close(transcoder.W_dec.grad, [[-0.10624, 0.07968], [-0.61, 0.0], [0.0, 0.83475]])


def test_a_target_of_zero_gives_a_finite_reference_loss() -> None:
    zero = Batch(GOLDEN.inputs, torch.zeros(2, 2))
    assert torch.isfinite(AutogradStep()(reference_transcoder(), zero, ReferenceObjective()).losses["loss"])


def test_variance_loss_is_one_for_predicting_the_mean() -> None:
    # variance of the columns (1, -1) and (2, -2) about their mean 0: 1 + 4
    targets = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert float(VarianceObjective(5.0).reconstruction(torch.zeros(2, 2), targets)) == 1.0


def test_variance_loss_and_l1_do_not_depend_on_the_scale_of_the_outputs() -> None:
    transcoder = random_transcoder(SMALL["relu"])
    inputs, targets = random_tensor(20, 8, 4), random_tensor(21, 8, 3)
    found = AutogradStep()(transcoder, Batch(inputs, targets), VarianceObjective(3.0)).losses
    with torch.no_grad():  # a transcoder whose activations and outputs are ten times as large
        for parameter in (transcoder.W_enc, transcoder.b_enc, transcoder.b_dec_out):
            parameter.mul_(10)
    scaled = AutogradStep()(transcoder, Batch(inputs, 10 * targets), VarianceObjective(300.0)).losses
    assert {name: float(value) for name, value in scaled.items()} == pytest.approx(
        {name: float(value) for name, value in found.items()}
    )


def test_l1_is_summed_over_features_and_averaged_over_all_rows() -> None:
    transcoder = ReLU(l1=2.0).build(2, 2, 3)
    activations = torch.ones(4, 5, 3)
    assert float(transcoder.penalties(activations, 1.0)["sparsity"]) == 2.0 * 3


def test_topk_keeps_the_k_largest_positive_pre_activations() -> None:
    transcoder = TopK(k=2).build(1, 1, 4)
    pre_activations = torch.tensor([[0.5, 3.0, -9.0, 2.0], [-1.0, -2.0, 0.25, -3.0]])
    assert transcoder.activate(pre_activations).tolist() == [[0.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.25, 0.0]]


def test_topk_without_dense_activations_gives_the_same_outputs_counts_and_gradients() -> None:
    architecture = TopK(k=2)
    sparse, dense = (random_transcoder(architecture, d_sae=64) for _ in range(2))
    inputs = random_tensor(30, 16, 4)
    chosen = sparse.trace(inputs)  # 2 of 64 is below the share at which bags are used
    reference = Transcoder.trace(dense, inputs)
    assert torch.allclose(chosen.outputs, reference.outputs, atol=1e-12)
    assert torch.equal(chosen.n_active, reference.n_active)
    chosen.outputs.pow(2).sum().backward()
    reference.outputs.pow(2).sum().backward()
    for (name, found), wanted in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(_gradient(found), _gradient(wanted), atol=1e-10), name


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("objective", [VarianceObjective(2.5), ReferenceObjective()], ids=["variance", "reference"])
def test_gradients_agree_with_finite_differences(kind: str, objective: Objective) -> None:
    transcoder = random_transcoder(SMALL[kind], d_sae=100 if kind == "topk" else 10)
    batch = Batch(random_tensor(40, 6, 4), random_tensor(41, 6, 3))
    step = AutogradStep()
    step(transcoder, batch, objective)
    gradients = {name: _gradient(parameter).clone() for name, parameter in transcoder.named_parameters()}
    for index, (name, parameter) in enumerate(transcoder.named_parameters()):
        direction = random_tensor(50 + index, *parameter.shape)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            losses.append(float(step(transcoder, batch, objective).losses["loss"]))
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        wanted = float((gradients[name] * direction).sum())
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(wanted, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("kind", SMALL)
def test_firing_counts_are_the_rows_on_which_a_feature_is_positive(kind: str) -> None:
    transcoder = random_transcoder(SMALL[kind])
    inputs = random_tensor(60, 9, 4)
    assert torch.equal(transcoder.trace(inputs).n_active, (transcoder.encode(inputs) > 0).sum(0))


@pytest.mark.parametrize("kind", SMALL)
def test_folded_transcoder_does_on_raw_rows_what_training_did_on_normalised_ones(kind: str) -> None:
    transcoder = random_transcoder(SMALL[kind])
    normalisation = Normalisation(10 * random_tensor(70, 4), 7.0, 3 * random_tensor(71, 3), 0.2)
    folded = transcoder.folded(normalisation)
    raw = 7 * random_tensor(72, 20, 4) + normalisation.mean_in
    wanted = normalisation.restore(transcoder(normalisation.inputs(raw)))
    assert torch.allclose(folded(raw), wanted, atol=1e-10)
    assert folded.b_dec is None
    assert torch.allclose(torch.linalg.vector_norm(folded.W_dec, dim=1), torch.ones(10).double())


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
    assert torch.equal(random_directions(1, "a", 5, 3), random_directions(1, "a", 5, 3))
    assert not torch.equal(random_directions(1, "a", 5, 3), random_directions(2, "a", 5, 3))
    assert not torch.equal(random_directions(1, "a", 5, 3), random_directions(1, "b", 5, 3))
