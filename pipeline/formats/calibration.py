"""Thresholds that stand in for TopK's k, and what they cost: measured on a cache's rows, before and after.

Each feature gets the threshold at which it fires on as many of the calibration rows as it does under TopK, so how often
features fire is kept; only which rows they are changes. One threshold for all, as BatchTopK has, would cost more: on
the demo's transcoder FVU 0.1413 becomes 0.1598 with one and 0.1519 with one per feature.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.pipeline.formats.jump_form import JumpForm, jump_form
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.cache_format import Site
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.evaluate import Predictor, evaluate, predictor
from tailrace.training.rows.batches import iter_once

BLOCK_ROWS = 1024
"""Rows encoded at once: memory is this times d_sae times 4 bytes, three times over."""
_BLOCK_VALUES = 1 << 25
"""Pre-activations of some features on all rows held at once: 128 MB."""


@dataclass(frozen=True)
class Calibration:
    """How faithful and sparse a transcoder is with its own rule and with thresholds."""

    rows: int
    """Rows the thresholds were chosen on."""
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
            f"a threshold per feature stands in for k: L0 {self.l0_before:.1f} becomes {self.l0_after:.1f}{cost} "
            f"(chosen on {self.rows:,} rows, measured on {self.measured_rows:,} {self.measured_on} rows)"
        )


@torch.no_grad()
def calibrate(transcoder: Transcoder, cache: ActivationCache, site: Site, n_rows: int) -> tuple[JumpForm, Calibration]:
    """Return a TopK transcoder with thresholds in place of k, chosen on ``n_rows`` training rows of ``site``.

    Its cost is measured on as many held-out rows, or on the same ones where there are none. The inputs of all
    calibration rows are held in memory.
    """
    batches = iter_once(cache.split("train"), site, batch_rows=BLOCK_ROWS, max_rows=n_rows)
    inputs = torch.cat([batch.inputs.clone() for batch in batches])
    form = jump_form(transcoder, thresholds(transcoder, inputs))
    name = "heldout" if "heldout" in cache.manifest.splits else "train"
    before, after = (
        evaluate(predict, iter_once(cache.split(name), site, batch_rows=BLOCK_ROWS, max_rows=n_rows))
        for predict in (predictor(transcoder), _predictor(form))
    )
    calibration = Calibration(
        rows=len(inputs),
        measured_on=name,
        measured_rows=before.n_rows,
        l0_before=before.l0,
        l0_after=after.l0,
        fvu_before=before.fvu,
        fvu_after=after.fvu,
    )
    return form, calibration


def thresholds(transcoder: Transcoder, inputs: Tensor) -> Tensor:
    """Return (d_sae,) thresholds that as many rows of ``inputs`` (rows, d_in) exceed as make each feature fire now.

    That is the next smaller pre-activation, an order statistic of the feature's own; never below 0. A feature that
    fires on none of the rows keeps silent on them.
    """
    n_active = torch.zeros(transcoder.d_sae, dtype=torch.int64)
    for start in range(0, len(inputs), BLOCK_ROWS):
        n_active += (transcoder.encode(inputs[start : start + BLOCK_ROWS]) > 0).sum(0)
    found = []
    size = max(1, _BLOCK_VALUES // len(inputs))
    for start in range(0, transcoder.d_sae, size):
        features = torch.arange(start, min(start + size, transcoder.d_sae))
        pre = transcoder.pre_activations_of(features, inputs).T.contiguous().numpy()
        found.append(_next_smaller(pre, n_active[features].numpy()))
    return torch.from_numpy(np.concatenate(found)).clamp(min=0)


def _next_smaller(values: NDArray[np.float32], n_above: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return of each row of ``values`` (n, rows) the value that ``n_above`` (n,) others come before, largest first.

    Where all of them come before there is none, and 0 is returned.
    """
    n_rows = values.shape[1]
    chosen = np.zeros(len(values), np.float32)
    for row, above in enumerate(n_above.tolist()):
        if above < n_rows:
            place = n_rows - 1 - above
            chosen[row] = np.partition(values[row], place)[place]
    return chosen


def _predictor(form: JumpForm) -> Predictor:
    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        activations = form.encode(inputs)
        return form.decode(activations, inputs), activations > 0

    return predict
