"""The step of a stack at active pairs only: one screening product a layer, everything else over the few that fire.

As for one layer (``tailrace.training.kernels.sparse``), and as exact. Pairs lie layer after layer, sorted by row in
each, so that what belongs to a layer is a slice. A feature's decoder row is wide, one width for each layer it writes
to, and is read only where the feature fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, LargestOfBatch
from tailrace.training.architectures.objectives import Objective
from tailrace.training.choices import KernelKind
from tailrace.training.cross_layer.stack import Stack, StackedEntries
from tailrace.training.kernels.adaptive import build_kernel
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepKernel, StepResult, finish
from tailrace.training.kernels.pairs import Pairs, decode_pairs, sum_by_row
from tailrace.training.kernels.select import Selector, keep_largest
from tailrace.training.kernels.sparse import clear_gradients
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

if TYPE_CHECKING:
    from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep


class _Layer(NamedTuple):
    """What one layer's pre-activations are made of."""

    inputs: Tensor
    W_enc: Tensor
    bias: Tensor


class SparseStackStep:
    """For stacks on the CPU. ``precision`` is that of the products which screen, and of nothing else."""

    def __init__(self, precision: Precision = "float32") -> None:
        self._precision = precision
        self._selectors: list[Selector] = []
        self._guess: float | None = None
        """A value that all activations of the next batch are likely to exceed; changes no result."""

    def __call__(
        self,
        transcoder: Transcoder,
        batch: Batch,
        objective: Objective,
        extra: Sequence[ExtraLoss] = (),
        *,
        per_row: bool = False,
        reductions: BatchReductions = ALONE,
    ) -> StepResult:
        """Set ``.grad`` of every parameter and return the loss terms."""
        stack = cast("Stack", transcoder)
        inputs = batch.inputs.view(len(batch.inputs), stack.n_layers, stack.width_in).transpose(0, 1).contiguous()
        layers, pre = self._select(stack, inputs, reductions)
        clear_gradients(stack)
        entries = SparseStackEntries(layers, pre, stack, inputs, reductions)
        trace = stack.trace(entries, batch, objective)
        return finish(stack, entries, trace, batch, extra, per_row=per_row)

    @torch.no_grad()
    def _select(self, stack: Stack, inputs: Tensor, reductions: BatchReductions) -> tuple[list[Pairs], Tensor]:
        """Return the selected pairs of each layer of ``inputs`` (layers, rows, width_in), and their pre-activations."""
        if not self._selectors:
            own = torch.bfloat16 if self._precision == "bfloat16" else stack.W_enc.dtype
            self._selectors = [Selector(own) for _ in range(stack.n_layers)]
        selection, bias = stack.selection(), stack.encoder_bias()
        parts = [stack.of_layer(layer) for layer in range(stack.n_layers)]
        layers = [_Layer(x, stack.W_enc[own], bias[own]) for x, own in zip(inputs, parts, strict=True)]
        match selection:
            case Above(floor):
                floors = [Above(None if floor is None else floor[own]) for own in parts]
                selected = [
                    selector.select(*layer, above)
                    for selector, layer, above in zip(self._selectors, layers, floors, strict=True)
                ]
                return [pairs for pairs, _ in selected], torch.cat([pre for _, pre in selected])
            case LargestOfBatch(k):
                return self._largest(layers, k * reductions.n_rows(inputs.shape[1]), reductions)
            case _:
                raise AssertionError(f"no stack selects like {selection}")

    def _largest(
        self, layers: Sequence[_Layer], n_wanted: int, reductions: BatchReductions
    ) -> tuple[list[Pairs], Tensor]:
        """Return the ``n_wanted`` largest of all layers together, chosen among candidates above a guess."""
        selectors = list(zip(self._selectors, layers, strict=True))
        if self._guess is None:
            k = max(1, n_wanted // sum(len(layer.inputs) for layer in layers))
            self._guess = min(selector.first_guess(*layer, k) for selector, layer in selectors)
        guess = self._guess
        while True:
            parts = [selector.candidates(*layer, guess) for selector, layer in selectors]
            pre = torch.cat([part.pre for part in parts])
            cut = reductions.cut(pre, max(part.certain for part in parts), n_wanted)
            if cut.is_complete:
                break
            guess = guess / 2 if guess > max(part.smallest_guess for part in parts) else 0.0
        self._guess = Selector.guess_after(cut.threshold)
        kept = keep_largest(pre, np.array([0, len(pre)], np.int64), cut.n_own)
        ends = np.cumsum([len(part.pairs) for part in parts])
        pairs = [part.pairs.keep(own) for part, own in zip(parts, np.split(kept, ends[:-1]), strict=True)]
        return pairs, pre[torch.from_numpy(kept)]


class SparseStackEntries(StackedEntries):
    """Pre-activations at each layer's pairs; ``pre`` is their value, already computed, layer after layer."""

    def __init__(
        self, layers: Sequence[Pairs], pre: Tensor, stack: Stack, inputs: Tensor, reductions: BatchReductions = ALONE
    ) -> None:
        self.reductions = reductions
        self.n_rows = inputs.shape[1]
        self._layers = layers
        ends = np.cumsum([len(pairs) for pairs in layers]).tolist()
        self._parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._d_sae = stack.d_sae
        starts = range(0, stack.d_sae, stack.features_per_layer)
        self._features = torch.cat(
            [torch.from_numpy(pairs.features) + start for start, pairs in zip(starts, layers, strict=True)]
        )
        self._rows = torch.cat([torch.from_numpy(pairs.rows) for pairs in layers])
        self.pre = _EncodeStack.apply(pre, stack.W_enc, stack.b_enc, inputs, layers, self._parts)  # type: ignore[no-untyped-call]

    def at(self, per_feature: Tensor) -> Tensor:
        """Return each pair's feature's parameter."""
        return per_feature[self._features]

    def decode_layer(self, values: Tensor, layer: int, decoder: Tensor) -> Tensor:
        """Return the sum of one layer's decoder rows at each row's pairs."""
        return decode_pairs(values[self._parts[layer]], decoder, self._layers[layer])

    def count(self, active: Tensor) -> Tensor:
        """Return how many active pairs each feature has."""
        return torch.bincount(self._features[active], minlength=self._d_sae)

    def row_sums(self, values: Tensor) -> Tensor:
        """Return the sum over each row's pairs of all layers."""
        return sum_by_row(values, self._rows, self.n_rows)


class _EncodeStack(torch.autograd.Function):
    """Pre-activations of every layer at its pairs, whose values are given."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - so that autograd passes its gradient on
        inputs: Tensor,
        layers: Sequence[Pairs],
        parts: Sequence[slice],
    ) -> Tensor:
        ctx.save_for_backward(W_enc, inputs)
        ctx.layers, ctx.parts = layers, parts
        return pre.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, None, None, None]:
        W_enc, inputs = ctx.saved_tensors
        per_layer = W_enc.grad.view(len(inputs), -1, W_enc.shape[1])
        of_bias = []
        for layer, (pairs, part) in enumerate(zip(ctx.layers, ctx.parts, strict=True)):
            own = gradients[0][part].contiguous()
            pairs.add_outer(own, inputs[layer], per_layer[layer])
            of_bias.append(pairs.sums(own))
        return None, None, torch.cat(of_bias), None, None, None


def build_stack_kernel(
    kind: KernelKind, precision: Precision, device: torch.device, *, name: str, fused: bool = False
) -> StepKernel:
    """Return the kernel of a run of several layers; otherwise as ``build_kernel``."""
    steps: Any = {"sparse": SparseStackStep, "sparse_on_gpu": _stack_step_on_gpu}
    return build_kernel(kind, precision, device, name=name, fused=fused, **steps)


def _stack_step_on_gpu(gradients: DeviceGradients) -> DeviceStep:
    # triton is optional
    from tailrace.training.cross_layer.device import DeviceStackStep

    return DeviceStackStep(gradients)
