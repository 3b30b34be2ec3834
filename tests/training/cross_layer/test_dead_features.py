"""Dead features of several layers: the auxiliary loss and resampling, against the plain matrices of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.sparse import SparseStackStep
from tailrace.training.cross_layer.stack import Stack
from tailrace.training.dead_features.auxiliary import AuxK
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.loop.build import build_cross_layer_run
from tailrace.training.loop.optim import BlockedAdam, TorchOptimiser
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import RowSource, SampledRows
from tests.training.cross_layer.test_stack import (
    N_FEATURES,
    N_LAYERS,
    N_ROWS,
    WIDTH_IN,
    WIDTH_OUT,
    every_stack,
    plain_decoder,
    plain_encoder,
    rows,
)

DEAD = [1, 3, 4, 8, 9, 10, 16]
"""Of all three layers: 1 to 4 read the first, 8 to 10 the second, 16 the third."""
COEFFICIENT = 0.25


def by_hand(stack: Stack, batch: Batch, outputs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the auxiliary loss, and its gradients to the plain encoder and decoder."""
    encoder, decoder = (plain(stack).detach().requires_grad_() for plain in (plain_encoder, plain_decoder))
    pre = batch.inputs @ encoder.T + stack.b_enc.detach()
    activations = torch.zeros_like(pre)
    for layer in range(N_LAYERS):
        own = [feature for feature in DEAD if feature // N_FEATURES == layer]
        largest = pre[:, own].topk(min(k, len(own)), dim=1).indices
        chosen = torch.tensor(own)[largest]
        activations = activations.scatter(1, chosen, pre.gather(1, chosen))
    residual = (batch.outputs - outputs).detach()
    spread = (residual - residual.mean(0)).square().sum()
    loss = COEFFICIENT * (residual - activations @ decoder).square().sum() / spread
    loss.backward()
    assert encoder.grad is not None
    assert decoder.grad is not None
    return loss.detach(), encoder.grad, decoder.grad


@pytest.mark.parametrize("kernel", [DenseStep, SparseStackStep])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_dead_features_of_each_layer_reconstruct_what_is_left(
    k: int, kernel: type[DenseStep] | type[SparseStackStep]
) -> None:
    stack, objective = every_stack()[2].double(), VarianceObjective(7.0)
    batch = Batch(rows(1, WIDTH_IN).double(), rows(2, WIDTH_OUT).double())
    firing = FiringRecord(stack.d_sae)
    firing.steps_since_fired[DEAD] = 10
    plain = kernel()(stack, batch, objective)
    without = {name: value.grad.clone() for name, value in stack.named_parameters() if value.grad is not None}
    auxiliary = AuxK(aux_k=k, aux_coefficient=COEFFICIENT).build(firing, objective, dead_after_steps=10)
    assert auxiliary is not None
    result = kernel()(stack, batch, objective, [auxiliary])
    loss, of_encoder, of_decoder = by_hand(stack, batch, plain.outputs, k)
    torch.testing.assert_close(result.losses["auxk"], loss)
    assert stack.W_enc.grad is not None
    for layer, block in enumerate(stack.blocks()):
        own, name = block.features, f"W_dec_{layer}"
        added = stack.W_enc.grad[own] - without["W_enc"][own]
        torch.testing.assert_close(added, of_encoder[own, block.inputs])
        assert block.W_dec.grad is not None
        torch.testing.assert_close(block.W_dec.grad - without[name], of_decoder[own, block.outputs])


class Planted:
    """Row sources of three sites that draw the same tokens."""

    def __init__(self) -> None:
        self.inputs, self.outputs = rows(3, WIDTH_IN, 400) + 2.0, rows(4, WIDTH_OUT, 400) * 3

    def side(self, layer: int) -> Batch:
        ins, outs = (slice(layer * width, (layer + 1) * width) for width in (WIDTH_IN, WIDTH_OUT))
        return Batch(self.inputs[:, ins], self.outputs[:, outs])

    def source(self, layer: int) -> RowSource:
        def draw(n_rows: int, step: int) -> SampledRows:
            first = step % 7
            chosen = slice(first, first + n_rows)
            return SampledRows(Batch(*(side[chosen] for side in self.side(layer))), None, None)

        return draw


SITES = [Site(f"layer{n}", f"blocks.{n}.in", f"blocks.{n}.out", WIDTH_IN, WIDTH_OUT, "float32") for n in range(3)]


def build(planted: Planted, **settings: Any) -> TrainingRun:
    def statistics(layer: int) -> dict[Side, SiteStatistics]:
        sides: dict[Side, SiteStatistics] = {"in": SiteStatistics(WIDTH_IN), "out": SiteStatistics(WIDTH_OUT)}
        for side, values in zip(sides.values(), planted.side(layer), strict=True):
            side.add(np.asarray(values))
        return sides

    return build_cross_layer_run(
        TrainSettings.read(
            {"cross_layer": True, "architecture": {"kind": "batch_topk", "k": 2}, "d_sae": N_FEATURES, "lr": 1e-2},
            {"warmup_steps": 0, **settings},
        ),
        SITES,
        {site.name: statistics(layer) for layer, site in enumerate(SITES)},
        n_steps=100,
        device=torch.device("cpu"),
        precision="float32",
        row_sources={site.name: planted.source(layer) for layer, site in enumerate(SITES)},
    )


@pytest.mark.parametrize("kind", ["anthropic", "l2"])
def test_a_resampled_feature_reads_its_layer_and_writes_the_error_of_it_and_later_ones(kind: str) -> None:
    planted = Planted()
    resampling = {"kind": kind, "resample_every": 4, "resample_rows": 1, "resample_scale": 0.3}
    never, run = build(planted), build(planted, resampling=resampling)
    for one in (never, run):
        with torch.no_grad():
            one.transcoder.b_enc[DEAD] = -50.0
        for step in range(4):
            chosen = slice(step * N_ROWS, (step + 1) * N_ROWS)
            one.step({site.name: Batch(*(x[chosen] for x in planted.side(n))) for n, site in enumerate(SITES)})
    # One row is drawn: it becomes the first dead feature, or with replacement all of them.
    replaced = DEAD[:1] if kind == "anthropic" else DEAD
    assert run.latest_extras == {"resampled_features": len(replaced)}
    drawn = [planted.source(layer)(1, 4).batch for layer in range(N_LAYERS)]
    raw = Batch(torch.cat([one.inputs for one in drawn], 1), torch.cat([one.outputs for one in drawn], 1))
    row = run.on_device.apply(raw)
    error = (row.outputs - never.transcoder(row.inputs)).detach()[0]
    for layer, block in enumerate(run.transcoder.blocks()):
        own = [feature for feature in replaced if feature // N_FEATURES == layer]
        if not own:
            continue
        norms = torch.linalg.vector_norm(never.transcoder.W_enc.detach()[block.features], dim=1)
        living = [f for f in range(N_FEATURES) if f + layer * N_FEATURES not in DEAD]
        centred, missed = row.inputs[0, block.inputs], error[block.outputs]  # standard normalisation centres at zero
        for feature in own:
            reads = run.transcoder.W_enc.detach()[feature]
            torch.testing.assert_close(
                reads, centred / centred.norm() * 0.3 * norms[living].mean(), atol=1e-5, rtol=1e-4
            )
            writes = block.W_dec.detach()[feature - block.features.start]
            torch.testing.assert_close(writes, missed / missed.norm(), atol=1e-5, rtol=1e-4)
    same = [feature for feature in range(N_LAYERS * N_FEATURES) if feature not in replaced]
    assert torch.equal(run.transcoder.W_enc[same], never.transcoder.W_enc[same])
    assert not bool(run.firing.steps_since_fired[replaced].any())


def test_a_restarted_feature_is_forgotten_in_every_matrix_and_no_other_is() -> None:
    planted = Planted()
    run = build(planted)
    batch = {site.name: Batch(*(x[:N_ROWS] for x in planted.side(n))) for n, site in enumerate(SITES)}
    adam = TorchOptimiser(run.transcoder, [torch.optim.Adam(run.transcoder.parameters())])
    average = WeightAverage(run.transcoder, 0.9)
    for _ in range(2):
        run.step(batch)
        adam.step(1e-2)
        average.update()
    assert isinstance(run.optimiser, BlockedAdam)
    for optimiser in (run.optimiser, adam):
        before = {name: value.clone() for name, value in optimiser.state_tensors().items()}
        optimiser.forget(torch.tensor(DEAD))
        after = optimiser.state_tensors()
        for name, values in before.items():
            if values.ndim == 0 or "b_dec_out" in name:
                assert torch.equal(after[name], values), name
                continue
            parameter = name.split(".")[-1]
            start = int(parameter.removeprefix("W_dec_")) * N_FEATURES if parameter.startswith("W_dec_") else 0
            own = [feature - start for feature in DEAD if 0 <= feature - start < len(values)]
            assert not bool(after[name][own].any()), name
            kept = [row for row in range(len(values)) if row not in own]
            assert torch.equal(after[name][kept], values[kept]), name
    latest = run.transcoder
    average.restart(torch.tensor(DEAD))
    for layer, block in enumerate(latest.blocks()):
        own = [feature - block.features.start for feature in DEAD if feature // N_FEATURES == layer]
        averaged = average.transcoder.blocks()[layer].W_dec
        assert torch.equal(averaged[own], block.W_dec[own])
        assert not torch.equal(averaged, block.W_dec)
