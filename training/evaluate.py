"""How good a transcoder is on rows it was not trained on: FVU, L0, dead features.

FVU is pooled: squared error summed over all rows, over the squared distance of all targets from *their own* mean. It is
not an average of per-batch or per-row ratios, which would weigh rows with small outputs more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.architectures.base import Transcoder
from training.batches import Batch


class Predictor(Protocol):
    """Maps raw inputs (rows, d_in) to predicted raw outputs (rows, d_out) and firing counts (d_sae,)."""

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (outputs, number of rows on which each feature fired)."""
        ...


@dataclass(frozen=True)
class HeldoutScore:
    """Quality on a set of rows."""

    n_rows: int
    fvu: float | None
    """Fraction of variance unexplained; None if the targets do not vary."""
    l0: float
    """Mean number of features that fire on a row."""
    dead_fraction: float
    """Share of features that fire on none of the rows."""

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


class _Sums:
    """Float64 sums on the host, taken about the first row's target so that a large mean cancels nothing."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.error = 0.0
        self.squares = 0.0
        self.origin: Tensor | None = None
        self.offsets: Tensor | None = None
        self.n_active: Tensor | None = None

    def add(self, targets: Tensor, predicted: Tensor, n_active: Tensor) -> None:
        if self.origin is None or self.offsets is None or self.n_active is None:
            self.origin = targets[0].clone()
            self.offsets = torch.zeros(targets.shape[1], dtype=torch.float64)
            self.n_active = torch.zeros(len(n_active), dtype=torch.int64)
        shifted = targets - self.origin
        self.n_rows += len(targets)
        self.error += _sum_of_squares(predicted - targets)
        self.squares += _sum_of_squares(shifted)
        self.offsets += shifted.sum(0).cpu().double()
        self.n_active += n_active.cpu()


def _sum_of_squares(rows: Tensor) -> float:
    return float(rows.pow(2).sum(1).cpu().double().sum())


@torch.no_grad()
def evaluate(predict: Predictor, batches: Iterable[Batch]) -> HeldoutScore:
    """Score ``predict`` on raw ``batches``; there must be at least one row."""
    sums = _Sums()
    for batch in batches:
        outputs, n_active = predict(batch.inputs)
        sums.add(batch.outputs, outputs, n_active)
    if sums.offsets is None or sums.n_active is None:
        raise ValueError("no rows to evaluate on")
    spread = sums.squares - float(sums.offsets.pow(2).sum()) / sums.n_rows
    return HeldoutScore(
        n_rows=sums.n_rows,
        fvu=sums.error / spread if spread > 0 else None,
        l0=int(sums.n_active.sum()) / sums.n_rows,
        dead_fraction=int((sums.n_active == 0).sum()) / len(sums.n_active),
    )


def predictor(transcoder: Transcoder) -> Predictor:
    """Return a loaded (folded) transcoder as something ``evaluate`` can score."""

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        activations = transcoder.encode(inputs)
        return transcoder.decode(activations, inputs), (activations > 0).sum(0)

    return predict
