"""Blocks of rows with a transcoder's active pairs, in the order of rows and of features, and its predictions."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.harvest.encoding import Coder, Encoded, Encoder
from tailrace.analysis.harvest.rows import RowBlock
from tailrace.training.kernels.pairs import Pairs

__all__ = ["Coder", "EncodedBlock", "FeaturePairs"]


class FeaturePairs(NamedTuple):
    """Active pairs of consecutive features, sorted by feature and within a feature by row."""

    first_feature: int
    offsets: NDArray[np.int64]
    """(features + 1,) where each feature's pairs begin."""
    row: NDArray[np.int64]
    """(pairs,) row, counted from the start of the block or of the split."""
    value: NDArray[np.float32]
    """(pairs,) activations, above zero."""

    @property
    def features(self) -> range:
        """The features, those without a pair included."""
        return range(self.first_feature, self.first_feature + len(self.offsets) - 1)

    @property
    def feature(self) -> NDArray[np.int64]:
        """(pairs,) the feature of each pair."""
        return np.repeat(np.arange(self.features.start, self.features.stop), np.diff(self.offsets))


class EncodedBlock:
    """Rows of whole contexts with everything that accumulators may read, computed when it is first read."""

    def __init__(self, rows: RowBlock, inputs: Tensor, outputs: Tensor, encode: Encoder) -> None:
        self.rows = rows
        self.inputs = inputs
        """(rows, d_in) float32."""
        self.outputs = outputs
        """(rows, d_out) float32, on the host."""
        self._encode = encode

    @cached_property
    def _encoded(self) -> Encoded:
        return self._encode(self.inputs)

    def encode(self) -> None:
        """Compute everything now, before several threads read it."""
        self.by_feature  # noqa: B018 - kept from now on

    @property
    def pairs(self) -> Pairs:
        """The pairs with an activation above zero, in row order and within a row in feature order."""
        return self._encoded.pairs

    @property
    def values(self) -> NDArray[np.float32]:
        """(pairs,) the activations."""
        return self._encoded.values

    @property
    def predicted(self) -> NDArray[np.float32]:
        """(rows, d_out) the transcoder's outputs."""
        return self._encoded.predicted

    @cached_property
    def by_feature(self) -> FeaturePairs:
        """The same pairs by feature; rows are counted from the block's first."""
        order = self.pairs.order
        return FeaturePairs(0, self.pairs.feature_offsets, self.pairs.rows[order], self.values[order])
