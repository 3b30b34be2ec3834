"""The threshold that stands in for TopK's k, and what it costs: measured on a cache's rows, before and after.

With one threshold for all features, rows take as many features as exceed it, as BatchTopK does in use (Bussmann et al.
2024, "BatchTopK sparse autoencoders", section 3). It is chosen so that on the calibration rows exactly as many pairs of
row and feature are active as under TopK: an order statistic of all pre-activations, found exactly in two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.exports.jump_form import JumpForm, jump_form
from storage.activation_cache import ActivationCache
from storage.cache_format import Site
from training.architectures.base import Transcoder
from training.batches import Batch, iter_once
from training.evaluate import Predictor, evaluate, predictor

BLOCK_ROWS = 1024
"""Rows encoded at once: memory is this times d_sae times 4 bytes, three times over."""
_HALF = 16
_LOW = np.uint32((1 << _HALF) - 1)


@dataclass(frozen=True)
class Calibration:
    """A threshold, and how faithful and sparse the transcoder is with its own rule and with the threshold."""

    threshold: float
    rows: int
    """Rows the threshold was chosen on."""
    measured_on: str
    """Split of the rows on which the rest was measured."""
    measured_rows: int
    l0_before: float
    l0_after: float
    fvu_before: float | None
    fvu_after: float | None

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)

    def sentence(self) -> str:
        """Say what the exchange costs."""
        if self.fvu_before is None or self.fvu_after is None:
            cost = ""
        else:
            cost = f", FVU {self.fvu_before:.4f} becomes {self.fvu_after:.4f}"
        return (
            f"one threshold, {self.threshold:.4g}, stands in for k: L0 {self.l0_before:.1f} becomes "
            f"{self.l0_after:.1f}{cost} (chosen on {self.rows:,} rows, measured on {self.measured_rows:,} "
            f"{self.measured_on} rows)"
        )


@torch.no_grad()
def calibrate(transcoder: Transcoder, cache: ActivationCache, site: Site, n_rows: int) -> tuple[JumpForm, Calibration]:
    """Return a TopK transcoder with a threshold in place of k, chosen on ``n_rows`` training rows of ``site``.

    Its cost is measured on as many held-out rows, or on the same ones where there are none.
    """
    train = cache.split("train")

    def batches() -> Iterable[Batch]:
        return iter_once(train, site, batch_rows=BLOCK_ROWS, max_rows=n_rows)

    n_active = sum(int((transcoder.encode(batch.inputs) > 0).sum()) for batch in batches())
    threshold = largest_excluded(
        lambda: (_positive(transcoder.pre_activations(batch.inputs)) for batch in batches()), n_active
    )
    form = jump_form(transcoder, threshold)
    name = "heldout" if "heldout" in cache.manifest["splits"] else "train"
    scores = [
        evaluate(predict, iter_once(cache.split(name), site, batch_rows=BLOCK_ROWS, max_rows=n_rows))
        for predict in (predictor(transcoder), _predictor(form))
    ]
    before, after = scores
    calibration = Calibration(
        threshold=threshold,
        rows=min(n_rows, train.n_rows),
        measured_on=name,
        measured_rows=before.n_rows,
        l0_before=before.l0,
        l0_after=after.l0,
        fvu_before=before.fvu,
        fvu_after=after.fvu,
    )
    return form, calibration


def largest_excluded(blocks: Callable[[], Iterable[NDArray[np.float32]]], n_kept: int) -> float:
    """Return the threshold that exactly ``n_kept`` of all values exceed: the next smaller one; 0 if there is none.

    ``blocks`` gives the values, all positive, anew at each of two calls. Positive floats are ordered as their bits are,
    so a histogram of the upper halves finds where the wanted one lies and one of the lower halves finds it: exact, in
    half a megabyte. Of several equal values at the border, none is kept.
    """
    upper = _counts(blocks(), lambda bits: bits >> np.uint32(_HALF))
    n_left = int(upper.sum()) - n_kept
    if n_left <= 0:
        return 0.0
    high = int(np.searchsorted(np.cumsum(upper), n_left))
    n_below = int(upper[:high].sum())
    lower = _counts(blocks(), lambda bits: bits[bits >> np.uint32(_HALF) == high] & _LOW)
    low = int(np.searchsorted(np.cumsum(lower), n_left - n_below))
    return float(np.array([(high << _HALF) | low], np.uint32).view(np.float32)[0])


def _counts(
    blocks: Iterable[NDArray[np.float32]], halves: Callable[[NDArray[np.uint32]], NDArray[np.uint32]]
) -> NDArray[np.int64]:
    counts = np.zeros(1 << _HALF, np.int64)
    for block in blocks:
        counts += np.bincount(halves(block.view(np.uint32)), minlength=1 << _HALF)
    return counts


def _positive(values: Tensor) -> NDArray[np.float32]:
    positive: NDArray[np.float32] = values[values > 0].numpy()
    return positive


def _predictor(form: JumpForm) -> Predictor:
    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        activations = form.encode(inputs)
        return form.decode(activations, inputs), activations > 0

    return predict
