"""Encoders from a block's inputs to its active pairs and predictions; the faster of two is chosen.

*Sparse*: one matrix product that says which pairs may be active, in bfloat16 where the processor multiplies it; those
few are computed exactly and the choice is made among them (``tailrace.training.kernels.select``), so no rows × d_sae
matrix of float32 exists. *Dense*: all activations of a few rows at a time; for devices other than the CPU, for coders
without a selection known here, and where many features fire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import LargestPerRow, Selection
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.kernels.pairs import Pairs, SparseEntries
from tailrace.training.kernels.select import Selector
from tailrace.training.rows.transfer import arrived, to_host

DENSE_BYTES = 128 << 20
"""Memory of one piece of dense activations."""
DENSE_BYTES_ON_GPU = 2 << 30
"""The same on a GPU, where a piece costs a wait and what comes with it is far from the cores."""
SPARSE_BELOW = 0.08
"""Share of active pairs below which the sparse way is taken. Both take as long at 0.11 (width 768, d_sae 6,144)."""


class Coder(Protocol):
    """The part of a transcoder that analysis uses."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the output."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of features."""
        ...

    @property
    def W_enc(self) -> Tensor:
        """(d_sae, d_in) encoder, one row per feature."""
        ...

    @property
    def b_enc(self) -> Tensor:
        """(d_sae,) encoder bias."""
        ...

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, d_out) decoder, one row per feature."""
        ...

    def encode(self, x: Tensor, /) -> Tensor:
        """Return activations (rows, d_sae) of inputs (rows, d_in)."""
        ...

    def decode(self, acts: Tensor, inputs: Tensor, /) -> Tensor:
        """Return predicted outputs (rows, d_out) of activations (rows, d_sae)."""
        ...


class Encoded(NamedTuple):
    """Active pairs and predictions of rows."""

    pairs: Pairs
    """Entries with an activation above zero."""
    values: NDArray[np.float32]
    """(pairs,) these activations."""
    predicted: NDArray[np.float32]
    """(rows, d_out)."""


class Encoder(Protocol):
    """Encodes and decodes rows."""

    def __call__(self, inputs: Tensor, /) -> Encoded:
        """Return active pairs and predictions of float32 inputs (rows, d_in)."""
        ...


class DenseEncoder:
    """Computes all activations, of as many rows at a time as ``DENSE_BYTES`` hold."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder

    def __call__(self, inputs: Tensor) -> Encoded:
        """Return active pairs and predictions of inputs (rows, d_in)."""
        n_bytes = DENSE_BYTES_ON_GPU if inputs.is_cuda else DENSE_BYTES
        pieces = torch.split(inputs, max(1, n_bytes // (4 * self._coder.d_sae)))
        if inputs.is_cuda:
            return self._encode_on_gpu(pieces)
        columns, values, counts, predicted = (
            np.concatenate(parts) for parts in zip(*map(self._encode, pieces), strict=True)
        )
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(np.arange(len(inputs)), counts)
        return Encoded(Pairs(rows, columns, offsets, self._coder.d_sae), values, predicted)

    def _encode(
        self, inputs: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        acts = self._coder.encode(inputs)
        flat = np.flatnonzero((acts > 0).numpy())  # 2 to 3 times faster than torch.nonzero on a CPU
        rows, columns = np.divmod(flat, acts.shape[1])
        values = acts.flatten()[torch.from_numpy(flat)].float().numpy()
        predicted = self._coder.decode(acts, inputs).float().numpy()
        return columns, values, np.bincount(rows, minlength=len(inputs)), predicted

    def _encode_on_gpu(self, pieces: Sequence[Tensor]) -> Encoded:
        """Return the same of pieces: active pairs are picked and sorted there, and only they come to the host."""
        d_sae, n_rows = self._coder.d_sae, 0
        places, values, predicted = [], [], []
        for inputs in pieces:
            acts = self._coder.encode(inputs)
            predicted.append(self._coder.decode(acts, inputs).float())
            flat = acts.flatten()
            active = torch.nonzero(flat > 0).flatten()  # the host waits: how many there are decides what follows
            values.append(flat[active].float())
            places.append(active + n_rows * d_sae)
            n_rows += len(inputs)
            del acts, flat  # or they would be in memory beside the next piece's
        place = torch.cat(places)
        rows, features = place // d_sae, place % d_sae
        ascending, order = torch.sort(features, stable=True)
        device = place.device
        offsets = torch.searchsorted(rows, torch.arange(n_rows + 1, device=device))
        feature_offsets = torch.searchsorted(ascending, torch.arange(d_sae + 1, device=device))
        on_device = (rows, features, offsets, order, feature_offsets, torch.cat(values), torch.cat(predicted))
        on_host = [to_host(numbers) for numbers in on_device]
        arrived().synchronize()
        row, feature, offset, *by_feature, value, prediction = (numbers.numpy() for numbers in on_host)
        pairs = _SortedPairs(row, feature, offset, d_sae, (by_feature[0], by_feature[1]))
        return Encoded(pairs, value, prediction)


class _SortedPairs(Pairs):
    """Pairs whose order by feature is known."""

    def __init__(
        self,
        rows: np.ndarray,
        features: np.ndarray,
        offsets: np.ndarray,
        d_sae: int,
        by_feature: tuple[np.ndarray, np.ndarray],
    ) -> None:
        super().__init__(rows, features, offsets, d_sae)
        self.__dict__["_sorted"] = by_feature


class SparseEncoder:
    """Computes active pairs only. Values agree with the dense ones to the order of float32 sums."""

    def __init__(self, coder: Transcoder, selection: Selection) -> None:
        device = torch.device("cpu")
        self._coder, self._selection = coder, selection
        is_rounded = resolve_precision("auto", device) == "bfloat16"
        self._selector = Selector(torch.bfloat16 if is_rounded else torch.float32)
        self._dense = DenseEncoder(coder)

    def __call__(self, inputs: Tensor) -> Encoded:
        """Return active pairs and predictions of inputs (rows, d_in)."""
        if not torch.isfinite(
            inputs.sum()
        ):  # nothing exceeds a margin that is not finite; the dense encoder yields NaN
            return self._dense(inputs)
        coder = self._coder
        pairs, pre = self._selector.select(inputs.contiguous(), coder.W_enc, coder.encoder_bias(), self._selection)
        entries = SparseEntries(pairs, pre, coder, inputs)
        activations = coder.activation(entries)
        predicted = entries.decode(activations, coder.W_dec) + coder.unexplained(inputs)
        values = activations.numpy()
        is_active = values > 0
        if not is_active.all():
            pairs, values = pairs.keep(is_active), values[is_active]
        return Encoded(pairs, values, predicted.numpy())


def open_encoder(coder: Coder, device: torch.device | str, density: float | None) -> Encoder:
    """Return the faster encoder where this share of pairs is active; ``density`` None: not known."""
    selection = selection_in_use(coder)
    is_sparse = torch.device(device).type == "cpu" and selection is not None
    if is_sparse and (density if density is not None else 1.0) < SPARSE_BELOW and _is_finite(coder):
        assert isinstance(coder, Transcoder)
        assert selection is not None
        return SparseEncoder(coder, selection)
    return DenseEncoder(coder)


def selection_in_use(coder: Coder) -> Selection | None:
    """Return the rule by which a transcoder activates pairs; None for a coder of another class."""
    return coder.selection_in_use() if isinstance(coder, Transcoder) else None


def expected_density(coder: Coder) -> float | None:
    """Return the share of pairs that can be active at most, where the architecture fixes it."""
    selection = selection_in_use(coder)
    return selection.k / coder.d_sae if isinstance(selection, LargestPerRow) else None


def _is_finite(coder: Coder) -> bool:
    return bool(torch.isfinite(coder.W_enc.sum() + coder.b_enc.sum()))
