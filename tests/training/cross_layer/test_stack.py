"""The blocks of a cross-layer transcoder, against the plain matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailrace.training.architectures import BatchTopK, JumpReLU, ReLU
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.sparse import SparseStackStep
from tailrace.training.cross_layer.stack import BatchTopKStack, CrossLayerTranscoder, ReLUStack, Stack
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import Precision
from tailrace.training.loop.optim import BlockedAdam, Optimiser, TorchOptimiser
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.normalisation import JoinedNormalisation, Normalisation

N_LAYERS, WIDTH_IN, WIDTH_OUT, N_FEATURES, N_ROWS = 3, 4, 5, 6, 40
SIZES = (N_LAYERS, WIDTH_IN, WIDTH_OUT, N_FEATURES)


def fill(stack: Stack, seed: int = 0) -> Stack:
    """Give a stack random weights, with decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        stack.constrain_parameters()
    return stack


def every_stack() -> list[Stack]:
    batch_topk = BatchTopKStack(*SIZES, settings=BatchTopK(k=2))
    batch_topk.threshold.fill_(0.4)
    jump = CrossLayerTranscoder(*SIZES, settings=JumpReLU(bandwidth=0.5))
    return [fill(one) for one in (batch_topk, jump, ReLUStack(*SIZES, settings=ReLU()))]


STACKS = [pytest.param(place, id=name) for place, name in enumerate(("batch_topk", "jumprelu", "relu"))]


def rows(seed: int, width: int, n_rows: int = N_ROWS) -> Tensor:
    return torch.randn(n_rows, N_LAYERS * width, generator=torch.Generator().manual_seed(seed))


def plain_encoder(stack: Stack) -> Tensor:
    """(d_sae, n_layers · width_in): block-diagonal."""
    whole = torch.zeros(stack.d_sae, stack.d_in, dtype=stack.W_enc.dtype)
    for layer in range(N_LAYERS):
        whole[stack.of_layer(layer), layer * WIDTH_IN : (layer + 1) * WIDTH_IN] = stack.W_enc[stack.of_layer(layer)]
    return whole


def plain_decoder(stack: Stack) -> Tensor:
    """(d_sae, n_layers · width_out): zero before the layer that a feature reads."""
    whole = torch.zeros(stack.d_sae, stack.d_out, dtype=stack.W_enc.dtype)
    for layer in range(N_LAYERS):
        whole[stack.of_layer(layer), layer * WIDTH_OUT :] = stack.decoder(layer)
    return whole


@pytest.mark.parametrize("place", STACKS)
def test_encode_and_decode_are_products_with_block_matrices(place: int) -> None:
    stack = every_stack()[place]
    inputs = rows(1, WIDTH_IN)
    assert (stack.d_in, stack.d_out, stack.d_sae) == (12, 15, 18)
    pre = inputs @ plain_encoder(stack).T + stack.b_enc
    torch.testing.assert_close(stack.pre_activations(inputs), pre)
    activations = pre * (pre > stack.thresholds()).float()
    torch.testing.assert_close(stack.encode(inputs), activations)
    assert 0 < float((activations > 0).float().mean()) < 1
    torch.testing.assert_close(stack.decode(activations), activations @ plain_decoder(stack) + stack.b_dec_out)
    # any leading dimensions
    torch.testing.assert_close(stack(inputs.view(5, 8, -1)), stack(inputs).view(5, 8, -1))


@pytest.mark.parametrize("kernel", [DenseStep, SparseStackStep])
@pytest.mark.parametrize("place", STACKS)
def test_a_steps_gradients_are_those_of_the_plain_matrices(
    place: int, kernel: type[DenseStep] | type[SparseStackStep]
) -> None:
    stack = every_stack()[place].double()
    inputs, outputs = rows(1, WIDTH_IN).double(), rows(2, WIDTH_OUT).double()
    objective = VarianceObjective(7.0)
    result = kernel()(stack, Batch(inputs, outputs), objective)
    encoder, decoder = plain_encoder(stack).detach().requires_grad_(), plain_decoder(stack).detach().requires_grad_()
    pre = inputs @ encoder.T + stack.b_enc.detach()
    floor = stack.thresholds()
    if isinstance(stack, BatchTopKStack):
        floor = pre.detach().relu().flatten().topk(2 * N_LAYERS * N_ROWS + 1).values[-1]
    activations = pre.relu() * (pre > floor)
    loss = (activations @ decoder + stack.b_dec_out.detach() - outputs).square().sum(1).mean() / 7.0
    summed = 0.05 / N_LAYERS**0.5 * activations.sum() / N_ROWS
    penalty: Tensor | float = summed if isinstance(stack, ReLUStack) else 0.0
    (loss + penalty).backward()
    assert encoder.grad is not None
    assert decoder.grad is not None
    torch.testing.assert_close(result.losses["reconstruction"], loss.detach())
    assert stack.W_enc.grad is not None
    for layer in range(N_LAYERS):
        own = stack.of_layer(layer)
        of_encoder = encoder.grad[own, layer * WIDTH_IN : (layer + 1) * WIDTH_IN]
        torch.testing.assert_close(stack.W_enc.grad[own], of_encoder)
        torch.testing.assert_close(stack.decoder(layer).grad, decoder.grad[own, layer * WIDTH_OUT :])
    torch.testing.assert_close(result.n_active, (activations > 0).sum(0))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", STACKS)
def test_sparse_steps_are_dense_ones_whatever_they_screen_in(place: int, precision: Precision) -> None:
    dense, sparse = every_stack()[place], every_stack()[place]
    dense_step, sparse_step = DenseStep(), SparseStackStep(precision)
    for seed in range(4):  # from the second on, what is looked for begins at the last batch's threshold
        batch = Batch(rows(seed, WIDTH_IN) * (1 + seed), rows(seed + 9, WIDTH_OUT))
        one = dense_step(dense, batch, VarianceObjective(3.0), per_row=True)
        other = sparse_step(sparse, batch, VarianceObjective(3.0), per_row=True)
        for name, value in one.losses.items():
            torch.testing.assert_close(other.losses[name], value, msg=name)
        assert torch.equal(one.n_active, other.n_active)
        torch.testing.assert_close(other.outputs, one.outputs)
        assert one.per_row is not None
        assert other.per_row is not None
        assert torch.equal(one.per_row.l0, other.per_row.l0)
        gradients = {name: parameter.grad for name, parameter in sparse.named_parameters()}
        for name, parameter in dense.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=f"{name}, batch {seed}")


def test_batch_topk_takes_k_a_layer_on_average_wherever_they_are() -> None:
    stack = every_stack()[0]
    with torch.no_grad():
        stack.b_enc[stack.of_layer(1)] += 3
    result = DenseStep()(stack, Batch(rows(1, WIDTH_IN), rows(2, WIDTH_OUT)), VarianceObjective(1.0))
    assert int(result.n_active.sum()) == 2 * N_LAYERS * N_ROWS
    assert int(result.n_active[stack.of_layer(1)].sum()) > 2 * N_ROWS


def test_the_l0_that_jumprelu_aims_for_is_the_mean_of_a_layer() -> None:
    stack = CrossLayerTranscoder(*SIZES, settings=JumpReLU(l0=0.5, target_l0=2.0))
    fill(stack)
    result = DenseStep()(stack, Batch(rows(1, WIDTH_IN), rows(2, WIDTH_OUT)), VarianceObjective(1.0))
    l0_a_layer = int(result.n_active.sum()) / N_ROWS / N_LAYERS
    assert l0_a_layer < 2
    assert float(result.losses["sparsity"]) == pytest.approx(0.5 * (l0_a_layer / 2 - 1) ** 2)


@pytest.mark.parametrize("place", STACKS)
def test_a_folded_stack_gives_on_raw_rows_what_it_gave_on_normalised_ones(place: int) -> None:
    stack = every_stack()[place]
    generator = torch.Generator().manual_seed(5)

    def vector(width: int) -> Tensor:
        return torch.randn(width, generator=generator, dtype=torch.float64)

    scales = ((2.0, 30.0), (0.5, 0.1), (7.0, 400.0))
    layers = [Normalisation(vector(WIDTH_IN), one, vector(WIDTH_OUT) * 10, other) for one, other in scales]
    units = JoinedNormalisation(layers)
    raw = stack.folded(units)
    assert isinstance(raw, CrossLayerTranscoder)
    batches = [Batch(rows(7 + layer, WIDTH_IN)[:, :WIDTH_IN] * 3, torch.zeros(N_ROWS, WIDTH_OUT)) for layer in range(3)]
    joined = units.to(torch.device("cpu"), torch.float32).join(batches)
    wanted = units.restore(stack(joined.inputs).double())
    inputs = torch.cat([batch.inputs for batch in batches], 1)
    # Layers differ in scale by 4000, so each is compared with its own.
    for layer, (_, scale) in enumerate(scales):
        part = slice(layer * WIDTH_OUT, (layer + 1) * WIDTH_OUT)
        torch.testing.assert_close(raw(inputs).double()[:, part], wanted[:, part], atol=1e-5 * scale, rtol=1e-5)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(raw.decoder(layer).norm(dim=1), torch.ones(N_FEATURES))
    assert torch.equal(raw.encode(inputs) > 0, stack.encode(joined.inputs) > 0)
    again = fill(every_stack()[place], seed=1)
    again.take_folded(raw, units)
    for name, value in stack.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_layers_own_part_is_that_of_the_whole() -> None:
    stack = every_stack()[1]
    assert isinstance(stack, CrossLayerTranscoder)
    inputs = rows(1, WIDTH_IN)
    whole = stack.encode(inputs)
    for layer in range(N_LAYERS):
        own = inputs[:, layer * WIDTH_IN : (layer + 1) * WIDTH_IN]
        torch.testing.assert_close(stack.encode_layer(layer, own), whole[:, stack.of_layer(layer)])
        for target in range(layer, N_LAYERS):
            written = plain_decoder(stack)[stack.of_layer(layer), target * WIDTH_OUT : (target + 1) * WIDTH_OUT]
            assert torch.equal(stack.writes(layer, target), written)
    with pytest.raises(ValueError, match="features of layer 2 write to it and later layers, not to layer 1"):
        stack.writes(2, 1)
    for ask in (lambda: stack.writes(0, 3), lambda: stack.encode_layer(3, inputs), lambda: stack.of_layer(-1)):
        with pytest.raises(IndexError, match="this stack has 3, which count from 0 whatever their numbers"):
            ask()


def test_both_optimisers_keep_every_decoder_row_at_unit_norm_and_agree() -> None:
    blocked, plain = every_stack()[2], every_stack()[2]
    optimisers: tuple[Optimiser, ...] = (
        BlockedAdam(blocked, clip=0.5),
        TorchOptimiser(plain, [torch.optim.Adam(plain.parameters(), lr=0.01)], clip=0.5),
    )
    batch = Batch(rows(1, WIDTH_IN), rows(2, WIDTH_OUT))
    for _ in range(5):
        for stack, optimiser in zip((blocked, plain), optimisers, strict=True):
            DenseStep()(stack, batch, VarianceObjective(1.0))
            optimiser.step(0.01)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(blocked.decoder(layer).norm(dim=1), torch.ones(N_FEATURES))
    for name, value in blocked.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


def test_penalties_weigh_the_mean_of_a_layer() -> None:
    inputs, outputs = rows(1, WIDTH_IN), rows(2, WIDTH_OUT)
    jump = fill(CrossLayerTranscoder(*SIZES, settings=JumpReLU(l0=0.25, bandwidth=0.5)))
    result = DenseStep()(jump, Batch(inputs, outputs), VarianceObjective(1.0))
    l0_a_layer = float((jump.encode(inputs) > 0).sum()) / N_ROWS / N_LAYERS
    assert float(result.losses["sparsity"]) == pytest.approx(0.25 * l0_a_layer)
    # Three layers of variance 4 each: a typical output is 2 long at one, √12 at all.
    relu = fill(ReLUStack(*SIZES, settings=ReLU(l1=0.5)))
    objective = VarianceObjective(12.0)
    relu.activation_unit = objective.activation_unit
    result = DenseStep()(relu, Batch(inputs, outputs), objective)
    l1_a_layer = float(relu.encode(inputs).detach().sum()) / 2 / N_ROWS / N_LAYERS
    assert float(result.losses["sparsity"]) == pytest.approx(0.5 * l1_a_layer)
