"""How faithful and how sparse a transcoder is while it stands in the model: FVU and L0 over the rows it replaced.

Inside a set of replaced layers a transcoder reads a residual stream that the others have already bent. What it is
compared with is the model's own output **for the inputs it gets there**, so the score is about the transcoder alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.splice.passes import PassTokens
from tailrace.analysis.splice.replacement import (
    InPlaceCoder,
    Substitute,
    decode_in_pass,
    other_layers,
    weights_dtype,
    width_problems,
)
from tailrace.storage.cache_format import Site


@dataclass(frozen=True)
class InPlaceScore:
    """One transcoder over the rows it replaced."""

    n_rows: int
    fvu: float | None
    """Σ‖y − ŷ‖² / Σ‖y − ȳ‖² pooled over the rows, ȳ their mean; None if the outputs do not vary."""
    l0: float | None
    """Mean number of active features per row; None without rows."""

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


class InPlaceSums:
    """Sums over rows, in float64 on the host; within a batch a row is summed in float32.

    The variance is summed about ``center`` (d_out,), any point near the mean output, and corrected at the end: about
    zero, large means would eat the digits. Without one, the first row serves.
    """

    def __init__(self, center: NDArray[np.float64] | None = None) -> None:
        self._center = None if center is None else torch.from_numpy(center).to(torch.float32)
        self._n_rows = 0
        self._n_active = 0
        self._error = 0.0
        self._squares = 0.0
        self._deviations: Tensor | float = 0.0

    def add(self, outputs: Tensor, predicted: Tensor, n_active: Tensor) -> None:
        """Count rows: the model's outputs and the transcoder's (rows, d_out), and active features per row (rows,)."""
        if not len(outputs):
            return
        exact = outputs.float()
        if self._center is None:
            self._center = exact[0].cpu()
        deviations = exact - self._center.to(exact.device)
        self._n_rows += len(exact)
        self._n_active += int(n_active.sum())
        self._error += _total((predicted.float() - exact).square().sum(1))
        self._squares += _total(deviations.square().sum(1))
        self._deviations = self._deviations + deviations.sum(0).cpu().double()

    def score(self) -> InPlaceScore:
        """Return FVU and L0 of all rows counted so far."""
        if self._n_rows == 0:
            return InPlaceScore(0, None, None)
        shift = torch.as_tensor(self._deviations, dtype=torch.float64)
        variation = self._squares - float(shift.square().sum()) / self._n_rows
        fvu = self._error / variation if variation > 0 else None
        return InPlaceScore(self._n_rows, fvu, self._n_active / self._n_rows)


class Measured(Substitute):
    """A transcoder that keeps account of itself. Only the rows where it replaces are encoded, and counted.

    ``where`` (contexts, positions), bool, is that of the batch, and of the ``replaced`` context it is used in.
    """

    def __init__(self, coder: InPlaceCoder, sums: InPlaceSums, where: Tensor) -> None:
        self._coder, self._sums, self._where = coder, sums, where

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the model's outputs with the transcoder's in the chosen rows."""
        return self._in_rows(inputs, outputs, self._where.to(outputs.device), None)

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:
        """Return the same, in the chosen rows of this pass."""
        return self._in_rows(inputs, outputs, tokens.part(self._where, "rows to measure"), tokens)

    def _in_rows(self, inputs: Tensor, outputs: Tensor, chosen: Tensor, tokens: PassTokens | None) -> Tensor:
        rows = inputs[chosen].to(weights_dtype(self._coder, inputs.dtype))
        activations = self._coder.encode(rows)
        predicted = decode_in_pass(self._coder, activations, rows, tokens).to(outputs.dtype)
        self._sums.add(outputs[chosen], predicted, (activations > 0).sum(-1))
        replaced = outputs.clone()
        replaced[chosen] = predicted
        return replaced

    def problems(self, site: Site) -> list[str]:
        """Return a sentence for every width that differs."""
        return width_problems(self._coder, site)

    def others(self) -> Mapping[Site, Substitute | None]:
        """Return the other layers of a cross-layer transcoder."""
        return other_layers(self._coder)


def _total(rows: Tensor) -> float:
    return float(rows.cpu().double().sum())
