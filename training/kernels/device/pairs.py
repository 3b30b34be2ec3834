"""The pairs of a batch on a GPU, in a fixed number of slots, and products at them, forwards and backwards.

Sizes do not depend on what fires, so the host never waits for one. A gradient of a weight matrix is kept as what it is
made of, ``PairGradient``: the optimiser sums it row by row, and it exists in memory only for those who ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tailrace.training.architectures.entries import Entries
from tailrace.training.kernels.device import operators
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions


@dataclass(frozen=True)
class DevicePairs:
    """Where pairs lie; ``select_programs`` says how. Of several layers, row l · rows + r is row r of layer l."""

    features: Tensor
    """int32 (n_slots,); ``d_sae`` in slots without a pair."""
    rows: Tensor
    """int32 (n_slots,)."""
    ends: Tensor
    """int32 (n_rows,): where each row's pairs end."""
    counts: Tensor
    """int32 (n_rows,)."""
    order: Tensor
    """int64 (n_slots,): slots in the order of features."""
    bounds: Tensor
    """int32 (d_sae + 1,): where each feature's pairs begin in ``order``."""
    norms: Tensor
    """float32 (n_rows,) of the inputs."""
    up_to: Tensor
    """int32 (d_sae + 1,): the numbers from 0 on, since what the host knows would have to be copied."""
    chosen_only: bool
    """Whether pairs whose value is zero have no gradient either."""
    row_offset: int = 0
    feature_offset: int = 0

    @property
    def d_sae(self) -> int:
        """Number of features, of all layers."""
        return len(self.bounds) - 1

    def of_layer(self, layer: int, n_rows: int, n_features: int) -> DevicePairs:
        """Return the pairs as those of a layer of ``n_rows`` rows and ``n_features`` features see them."""
        return replace(self, row_offset=layer * n_rows, feature_offset=layer * n_features)

    def sum_features(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return each feature's sum of values, (d_sae,)."""
        out = torch.empty(self.d_sae, dtype=dtype, device=values.device)
        operators.sum_features(_as_bytes(values), self.order, self.bounds, out)
        return out

    def sum_rows(self, values: Tensor) -> Tensor:
        """Return each row's sum of values, (n_rows,); int64 for bool."""
        dtype = torch.int64 if values.dtype == torch.bool else torch.float32
        out = torch.empty(len(self.ends), dtype=dtype, device=values.device)
        operators.sum_rows(_as_bytes(values), self.ends, self.counts, out)
        return out


def _as_bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == torch.bool else values


@dataclass(frozen=True)
class PairGradient:
    """The gradient of a weight matrix: row f is the sum of weight · (by_row[r] − taken_off) over the pairs of f."""

    weights: Tensor
    """(n_slots,)."""
    by_row: Tensor
    taken_off: Tensor | None
    rows: Tensor
    order: Tensor
    bounds: Tensor
    """Of the matrix's own features."""
    row_offset: int

    @property
    def pairs(self) -> list[Tensor]:
        """What operators take."""
        return [self.weights, self.by_row, self.rows, self.order, self.bounds]

    def add_to(self, gradient: Tensor) -> None:
        """Add it to a matrix."""
        operators.outer(
            self.weights, self.by_row, self.taken_off, self.rows, self.order, self.bounds, gradient, self.row_offset
        )


Keep = Callable[[str, PairGradient], None]
"""Takes the gradient of a parameter, by name."""


class DeviceEntries(Entries):
    """Pre-activations at slots, zero in those without a pair."""

    def __init__(
        self,
        pairs: DevicePairs,
        pre: Tensor,
        transcoder: Any,
        inputs: Tensor,
        keep: Keep,
        reductions: BatchReductions = ALONE,
        *,
        n_rows: int | None = None,
    ) -> None:
        """``n_rows``: those of a layer, where ``inputs`` (rows, d_in) are of several, one after another."""
        self.pairs, self._keep = pairs, keep
        self.reductions = reductions
        self.n_rows = len(inputs) if n_rows is None else n_rows
        self._group = pairs.up_to[-1:]
        self.pre = encode_pairs(pre, transcoder, inputs, pairs, keep)

    def at(self, per_feature: Tensor) -> Tensor:
        """Return each slot's feature's parameter, zero in slots without a pair."""
        gathered: Tensor = _Gather.apply(per_feature, self.pairs)  # type: ignore[no-untyped-call]
        return gathered

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return the sum of decoder rows of each row's pairs."""
        return decode_pairs(values, W_dec, self.pairs, self._keep, n_rows=self.n_rows, group_ends=self._group).squeeze(
            0
        )

    def decode_groups(self, values: Tensor, W_dec: Tensor, ends: Sequence[int]) -> Tensor:
        """Return one sum per group of features."""
        group_ends = torch.cat([self.pairs.up_to[end : end + 1] for end in ends])
        return decode_pairs(values, W_dec, self.pairs, self._keep, n_rows=self.n_rows, group_ends=group_ends)

    def count(self, active: Tensor) -> Tensor:
        """Return how many active pairs each feature has."""
        return self.pairs.sum_features(active, torch.int64)

    def row_sums(self, values: Tensor) -> Tensor:
        """Return the sum over each row's pairs."""
        return self.pairs.sum_rows(values).view(-1, self.n_rows).sum(0)


def encode_pairs(pre: Tensor, transcoder: Any, inputs: Tensor, pairs: DevicePairs, keep: Keep) -> Tensor:
    """Return pre-activations whose values are given, with gradients to the encoder, its bias and the input bias."""
    encoded: Tensor = _Encode.apply(  # type: ignore[no-untyped-call]
        pre, transcoder.W_enc, transcoder.b_enc, transcoder.input_bias, inputs, pairs, keep
    )
    return encoded


class _Encode(torch.autograd.Function):
    """Pre-activations ``W_enc (x − b_dec) + b_enc`` at pairs, whose values are given."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004 - so that autograd passes its gradient on
        b_dec: Tensor | None,
        inputs: Tensor,
        pairs: DevicePairs,
        keep: Keep,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, b_dec, inputs)
        ctx.pairs, ctx.keep = pairs, keep
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor | None, None, None, None]:
        W_enc, b_dec, inputs = ctx.saved_tensors
        pairs: DevicePairs = ctx.pairs
        weights = gradients[0].contiguous()
        ctx.keep("W_enc", PairGradient(weights, inputs, b_dec, pairs.rows, pairs.order, pairs.bounds, 0))
        of_bias = pairs.sum_features(weights)
        return None, None, of_bias, None if b_dec is None else -(of_bias @ W_enc), None, None, None


class _Gather(torch.autograd.Function):
    """A parameter of every feature at the feature of every slot."""

    @staticmethod
    def forward(ctx: Any, per_feature: Tensor, pairs: DevicePairs) -> Tensor:
        ctx.pairs = pairs
        out = torch.empty(len(pairs.features), device=per_feature.device)
        operators.gather(per_feature.contiguous(), pairs.features, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.pairs.sum_features(gradients[0].contiguous()), None


def decode_pairs(
    values: Tensor,
    W_dec: Tensor,
    pairs: DevicePairs,
    keep: Keep,
    *,
    n_rows: int,
    group_ends: Tensor,
    name: str = "W_dec",
) -> Tensor:
    """Return values @ W_dec, (groups, rows, d_out), for values at slots; groups of features end before ``group_ends``.

    The gradient of ``W_dec`` is handed to ``keep`` by ``name``.
    """
    decoded: Tensor = _Decode.apply(values, W_dec, pairs, keep, n_rows, group_ends, name)  # type: ignore[no-untyped-call]
    return decoded


class _Decode(torch.autograd.Function):
    """``values @ W_dec`` by groups of features, for values at slots."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        pairs: DevicePairs,
        keep: Keep,
        n_rows: int,
        group_ends: Tensor,
        name: str,
    ) -> Tensor:
        out = torch.empty(len(group_ends), n_rows, W_dec.shape[1], device=values.device)
        offsets = (pairs.row_offset, pairs.feature_offset)
        values = values.contiguous()
        operators.decode(
            values, W_dec, pairs.features, pairs.ends, pairs.counts, pairs.norms, group_ends, out, *offsets
        )
        ctx.save_for_backward(values, W_dec, group_ends)
        ctx.pairs, ctx.keep, ctx.name = pairs, keep, name
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        values, W_dec, group_ends = ctx.saved_tensors
        pairs: DevicePairs = ctx.pairs
        n_groups, n_rows, width = gradients[0].shape
        by_row = gradients[0].contiguous().view(-1, width)
        rows = pairs.rows
        if n_groups > 1:  # each group's gradients are rows of their own
            group = torch.bucketize(pairs.features, group_ends, right=True, out_int32=True)
            rows = rows + group * n_rows
        dots = torch.empty_like(values)
        chosen = values if pairs.chosen_only else None
        lists, offsets = (pairs.features, rows, pairs.order), (pairs.row_offset, pairs.feature_offset)
        operators.pair_dots(by_row, W_dec, None, chosen, *lists, dots, *offsets)
        if W_dec.requires_grad:
            bounds = pairs.bounds[pairs.feature_offset : pairs.feature_offset + len(W_dec) + 1]
            ctx.keep(ctx.name, PairGradient(values, by_row, None, rows, pairs.order, bounds, pairs.row_offset))
        return dots, None, None, None, None, None, None
