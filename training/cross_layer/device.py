"""The step of a stack at active pairs only, on a GPU: all layers by the same programs, decoders layer by layer.

A row of the batch is a row of every layer: row l · rows + r of what is selected is what layer l reads of row r.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.cross_layer.stack import DECODER, Stack, StackedEntries
from tailrace.training.kernels.device.pairs import DeviceEntries, DevicePairs, Keep, decode_pairs
from tailrace.training.kernels.device.step import DeviceStep
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch


class DeviceStackStep(DeviceStep):
    """For stacks on a GPU."""

    def _entries(self, transcoder: Transcoder, batch: Batch, reductions: BatchReductions) -> DeviceStackEntries:
        stack = cast("Stack", transcoder)
        inputs = batch.inputs.view(len(batch.inputs), stack.n_layers, stack.width_in).transpose(0, 1).contiguous()
        pairs, pre = self._select(stack, inputs, reductions)
        return DeviceStackEntries(pairs, pre, stack, inputs, partial(self.gradients.take, stack), reductions)


class DeviceStackEntries(StackedEntries):
    """Pre-activations at slots, of all layers."""

    def __init__(
        self,
        pairs: DevicePairs,
        pre: Tensor,
        stack: Stack,
        inputs: Tensor,
        keep: Keep,
        reductions: BatchReductions = ALONE,
    ) -> None:
        """``inputs`` (layers, rows, width_in)."""
        n_layers, self.n_rows, width = inputs.shape
        self.reductions, self._keep = reductions, keep
        vectors = inputs.view(n_layers * self.n_rows, width)
        self._entries = DeviceEntries(pairs, pre, stack, vectors, keep, reductions, n_rows=self.n_rows)
        self.pre = self._entries.pre
        n_features = stack.features_per_layer
        self._layers = [pairs.of_layer(layer, self.n_rows, n_features) for layer in range(n_layers)]
        self._group = pairs.up_to[n_features : n_features + 1]

    def at(self, per_feature: Tensor) -> Tensor:
        """Return each slot's feature's parameter, zero in slots without a pair."""
        return self._entries.at(per_feature)

    def count(self, active: Tensor) -> Tensor:
        """Return how many active pairs each feature has."""
        return self._entries.count(active)

    def row_sums(self, values: Tensor) -> Tensor:
        """Return the sum over each row's pairs of all layers."""
        return self._entries.row_sums(values)

    def decode_layer(self, values: Tensor, layer: int, decoder: Tensor) -> Tensor:
        """Return the sum of one layer's decoder rows at each row's pairs."""
        return decode_pairs(
            values,
            decoder,
            self._layers[layer],
            self._keep,
            n_rows=self.n_rows,
            group_ends=self._group,
            name=f"{DECODER}{layer}",
        ).squeeze(0)
