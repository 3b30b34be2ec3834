"""How good a transcoder is on rows it was not trained on: FVU, L0, how often its features fire.

FVU is pooled: squared error summed over all rows, over the squared distance of all targets from *their own* mean. It is
not an average of per-batch or per-row ratios, which would weigh rows with small outputs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import restrict
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.loop.firing_frequency import histogram, log10_frequency
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch, SiteBatches
from tailrace.training.rows.ordinary_rows import OrdinaryRows

SCORED_ACTIVATIONS = 1 << 26
"""How many activations, those of all layers, are held at a time where rows are scored: 256 MB, and copies of them."""
FREQUENT = {"1_percent": 0.01, "10_percent": 0.1}
"""Frequencies above which a feature counts as frequent, by the ending of the metric's name."""

_SHARES = {"l0_min": 0.0, "l0_p05": 0.05, "l0_p25": 0.25, "l0_p50": 0.5, "l0_p75": 0.75, "l0_p95": 0.95, "l0_max": 1.0}
"""Name and share of each quantile."""


class Predictor(Protocol):
    """Maps raw inputs (rows, d_in) to predicted raw outputs (rows, d_out), and says what fired."""

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (outputs, bool (rows, d_sae): which features fired)."""
        ...


@dataclass(frozen=True)
class HeldoutScore:
    """Quality on a set of rows."""

    n_rows: int
    fvu: float | None
    """Fraction of variance unexplained; None if the targets do not vary."""
    l0: float
    """Mean number of features that fire on a row."""
    l0_quantiles: dict[str, int]
    """Quantiles over rows of the number of features that fire, by name (``l0_min`` … ``l0_max``)."""
    dead_fraction: float
    """Share of features that fire on none of the rows."""
    mean_log10_frequency: float
    """Mean over features of log10(frequency + 1e-10)."""
    frequent: dict[str, float]
    """``freq_over_…``: share of features that fire on more than 1 or 10 percent of rows; ``normalized_freq_over_…``:
    the share of all firings that are theirs. The names are those of SAEBench."""
    log10_frequency: dict[str, Any]
    """Histogram over features of log10(frequency + 1e-10), in the fixed bins of ``firing_frequency``."""
    ordinary: OrdinaryScore | None = None
    """That of the ordinary rows alone, if they were told apart and there are any."""

    def record(self) -> dict[str, Any]:
        """Return the numbers, without the histogram, as flat JSON."""
        return {
            "n_rows": self.n_rows,
            "fvu": self.fvu,
            "l0": self.l0,
            **self.l0_quantiles,
            "dead_fraction": self.dead_fraction,
            "mean_log10_frequency": self.mean_log10_frequency,
            **self.frequent,
            **({} if self.ordinary is None else self.ordinary.record()),
        }


@dataclass(frozen=True)
class OrdinaryScore:
    """Quality on the rows whose vectors are not many times longer than most."""

    n_rows: int
    fvu: float | None
    """As for all rows, about these rows' own mean."""

    def record(self) -> dict[str, Any]:
        """Return the numbers as flat JSON."""
        return {"n_ordinary": self.n_rows, "fvu_ordinary": self.fvu}


class FitSums:
    """What a score is made of: float64 sums on the host, about the first row's target so that a large mean cancels
    nothing. ``reductions`` are those over all features, of which the processes of a group may each have some."""

    def __init__(self, reductions: BatchReductions = ALONE) -> None:
        self._reductions = reductions
        self.n_rows = 0
        self.error = 0.0
        self.squares = 0.0
        self.origin: Tensor | None = None
        self.offsets: Tensor | None = None
        self.n_active: Tensor | None = None
        self.l0: list[Tensor] = []

    def add(self, targets: Tensor, predicted: Tensor, active: Tensor) -> None:
        """Count rows: targets and predictions (rows, d_out), and which features fired, bool (rows, d_sae)."""
        if self.origin is None or self.offsets is None or self.n_active is None:
            self.origin = targets[0].clone()
            self.offsets = torch.zeros(targets.shape[1], dtype=torch.float64)
            self.n_active = torch.zeros(active.shape[1], dtype=torch.int64)
        shifted = targets - self.origin
        self.n_rows += len(targets)
        self.error += _sum_of_squares(predicted - targets)
        self.squares += _sum_of_squares(shifted)
        self.offsets += shifted.sum(0).cpu().double()
        self.n_active += _count(active, 0)
        self.l0.append(_count(active, 1))

    @property
    def fvu(self) -> float | None:
        """FVU of the rows so far; None if their targets do not vary."""
        if self.offsets is None:
            return None
        spread = self.squares - float(self.offsets.pow(2).sum()) / self.n_rows
        return self.error / spread if spread > 0 else None

    def score(self) -> HeldoutScore:
        """Return the score of the rows so far; raises ValueError if there were none."""
        if self.n_active is None:
            raise ValueError("no rows to evaluate on")
        n_active = self._reductions.all_features(self.n_active)
        log10 = log10_frequency(n_active, self.n_rows)
        return HeldoutScore(
            n_rows=self.n_rows,
            fvu=self.fvu,
            l0=int(n_active.sum()) / self.n_rows,
            l0_quantiles=l0_quantiles(self._reductions.over_features(torch.cat(self.l0))),
            dead_fraction=int((n_active == 0).sum()) / len(n_active),
            mean_log10_frequency=float(log10.mean()),
            frequent=_frequent(n_active, self.n_rows),
            log10_frequency=histogram(log10),
        )


def _count(active: Tensor, dim: int) -> Tensor:
    """Return on the host how many are true along ``dim``."""
    if active.device.type != "cpu":
        return active.sum(dim).cpu()
    return torch.from_numpy(np.count_nonzero(active.numpy(), axis=dim))  # a tenth of the time that torch takes


def _sum_of_squares(rows: Tensor) -> float:
    return float(rows.pow(2).sum(1).cpu().double().sum())


@torch.no_grad()
def evaluate(
    predict: Predictor,
    batches: Iterable[Batch],
    ordinary: OrdinaryRows | None = None,
    reductions: BatchReductions = ALONE,
) -> HeldoutScore:
    """Score ``predict`` on raw ``batches``, on ``ordinary`` rows also apart; there must be at least one row.

    ``reductions`` are those over all features, of which ``predict`` may know a slice.
    """
    sums, ordinary_sums = FitSums(reductions), FitSums()
    for batch in batches:
        outputs, active = predict(batch.inputs)
        sums.add(batch.outputs, outputs, active)
        if ordinary is not None and bool((mask := ordinary.mask(batch)).any()):
            ordinary_sums.add(batch.outputs[mask], outputs[mask], active[mask])
    score = sums.score()
    ordinary_score = OrdinaryScore(ordinary_sums.n_rows, ordinary_sums.fvu) if ordinary_sums.n_rows else None
    return replace(score, ordinary=ordinary_score)


@torch.no_grad()
def linear_fvu(rows: Iterable[Batch], heldout: Iterable[Batch], ordinary: OrdinaryRows | None = None) -> float | None:
    """Return the FVU on raw ``heldout`` of the affine map of inputs to outputs that fits raw ``rows`` best.

    Of ``ordinary`` rows alone, where given. None where rows are fewer than four for each input width, so that the fit
    would be to their noise, and where the targets do not vary. Least squares from sums in float64 on the host.
    """
    moments: list[Tensor] = []
    n_rows, d_in = 0, 0
    for batch in (_ordinary(batch, ordinary) for batch in rows):
        if not len(batch.inputs):
            continue
        if not moments:
            # about the first rows' means, so that a large mean cancels nothing
            middle_in, middle_out, d_in = batch.inputs.mean(0), batch.outputs.mean(0), batch.inputs.shape[1]
        inputs = torch.cat([batch.inputs - middle_in, torch.ones_like(batch.inputs[:, :1])], 1)
        sums = [(inputs.T @ inputs).cpu().double(), (inputs.T @ (batch.outputs - middle_out)).cpu().double()]
        moments = [total + more for total, more in zip(moments, sums, strict=True)] if moments else sums
        n_rows += len(inputs)
    if n_rows < 4 * max(d_in, 1):
        return None
    gram, products = moments
    ridge = 1e-6 * gram.diagonal().mean()  # of widths that hardly vary
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), products).to(middle_in)
    sums_of_squares = FitSums()
    for batch in (_ordinary(batch, ordinary) for batch in heldout):
        if len(batch.inputs):
            predicted = (batch.inputs - middle_in) @ weights[:-1] + weights[-1] + middle_out
            sums_of_squares.add(batch.outputs, predicted, batch.inputs[:, :0].bool())
    return sums_of_squares.fvu


def _ordinary(batch: Batch, ordinary: OrdinaryRows | None) -> Batch:
    if ordinary is None:
        return batch
    mask = ordinary.mask(batch)
    return Batch(batch.inputs[mask], batch.outputs[mask])


@torch.no_grad()
def score_layers(
    transcoder: CrossLayerTranscoder,
    sites: Sequence[str],
    batches: Iterable[SiteBatches],
    mask_of: Callable[[Sequence[Batch]], Tensor | None] = lambda _: None,
    reductions: BatchReductions = ALONE,
) -> Mapping[str, HeldoutScore]:
    """Return by site a score of each layer's output: its FVU, and L0 of the features that read that layer.

    ``transcoder`` is folded, ``sites`` lowest first and ``batches`` raw. The rows that ``mask_of`` tells, bool (rows,),
    are also scored apart, if they are not all. ``reductions`` are those over all features of a layer.
    """
    sums, ordinary = ({site: FitSums(reductions) for site in sites} for _ in range(2))
    for batch in in_pieces(batches, transcoder.d_sae):
        activations = transcoder.encode(torch.cat([batch[site].inputs for site in sites], 1))
        outputs = transcoder.decode(activations, reductions=reductions)
        mask = mask_of([batch[site] for site in sites])
        for layer, (site, predicted) in enumerate(zip(sites, outputs.chunk(len(sites), 1), strict=True)):
            active = activations[:, transcoder.of_layer(layer)] > 0
            targets = batch[site].outputs
            sums[site].add(targets, predicted, active)
            if mask is not None and bool(mask.any()):
                ordinary[site].add(targets[mask], predicted[mask], active[mask])
    scores = {}
    for site, all_rows in sums.items():
        part = ordinary[site]
        apart = OrdinaryScore(part.n_rows, part.fvu) if 0 < part.n_rows < all_rows.n_rows else None
        scores[site] = replace(all_rows.score(), ordinary=apart)
    return scores


def in_pieces(batches: Iterable[SiteBatches], d_sae: int) -> Iterator[SiteBatches]:
    """Yield the rows of ``batches``, no more at a time than their activations at ``d_sae`` features allow.

    A training step may hold active pairs alone; a score takes all activations.
    """
    n_rows = max(1, SCORED_ACTIVATIONS // d_sae)
    for batch in batches:
        for start in range(0, len(next(iter(batch.values())).inputs), n_rows):
            rows = slice(start, start + n_rows)
            yield {site: Batch(part.inputs[rows], part.outputs[rows]) for site, part in batch.items()}


def _frequent(n_active: Tensor, n_rows: int) -> dict[str, float]:
    shares: dict[str, float] = {}
    n_firings = max(1, int(n_active.sum()))
    for name, above in FREQUENT.items():
        frequent = n_active.double() / n_rows > above
        shares[f"freq_over_{name}"] = float(frequent.double().mean())
        shares[f"normalized_freq_over_{name}"] = int(n_active[frequent].sum()) / n_firings
    return shares


def predictor(transcoder: Transcoder, reductions: BatchReductions = ALONE) -> Predictor:
    """Return a loaded (folded) transcoder, or a slice of its features, as something ``evaluate`` can score."""

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        if reductions.shares_features:
            pre = restrict(transcoder.pre_activations(inputs), transcoder.selection_in_use(), reductions)
            activations = transcoder.activate(pre)
        else:
            activations = transcoder.encode(inputs)
        return transcoder.decode(activations, inputs, reductions), activations > 0

    return predict


def l0_quantiles(l0: Tensor) -> dict[str, int]:
    """Return nearest-rank quantiles of ``l0`` (rows,) by name: the ⌈q · rows⌉-th smallest, a number some row has."""
    quantiles = np.quantile(l0.cpu().numpy(), list(_SHARES.values()), method="inverted_cdf")
    return dict(zip(_SHARES, map(int, quantiles), strict=True))
