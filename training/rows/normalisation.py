"""Bring inputs and outputs of every model to one scale, so that one learning rate and one l1 suit all of them.

The scale is a single number per side, never one per dimension: dividing by per-dimension deviations would change which
errors matter. A trained transcoder is folded back (``Transcoder.folded``), so whoever loads it sees raw activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tailrace.storage.errors import NonFiniteActivation, SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.choices import NormalisationKind
from tailrace.training.rows.batches import Batch

CONSTANT = 1e-5
"""Variance over mean square below which rows count as equal: the cache sums squares in float32 blocks of 128 rows, so
a smaller variance cannot be told from rounding."""


@dataclass(frozen=True)
class Normalisation:
    """Affine maps ``(x − mean_in) / scale_in`` and ``(y − mean_out) / scale_out``."""

    mean_in: Tensor
    """(d_in,)."""
    scale_in: float
    mean_out: Tensor
    """(d_out,)."""
    scale_out: float

    def apply(self, batch: Batch) -> Batch:
        """Return the batch in normalised units."""
        return Batch(self.inputs(batch.inputs), self.outputs(batch.outputs))

    def inputs(self, inputs: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Return raw inputs in normalised units."""
        return (inputs - self.mean_in) / self.scale_in

    def outputs(self, outputs: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        """Return raw outputs in normalised units."""
        return (outputs - self.mean_out) / self.scale_out

    def restore(self, outputs: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        """Return normalised outputs in raw units."""
        return outputs * self.scale_out + self.mean_out

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return a copy whose means are on ``device`` in ``dtype``."""
        return type(self)(
            self.mean_in.to(device, dtype), self.scale_in, self.mean_out.to(device, dtype), self.scale_out
        )


@dataclass(frozen=True)
class JoinedNormalisation:
    """Several layers' normalisations, for rows that have the layers side by side, each of one width."""

    layers: Sequence[Normalisation]

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Return the layers' raw batches, normalised, side by side."""
        parts = [layer.apply(batch) for layer, batch in zip(self.layers, batches, strict=True)]
        return Batch(torch.cat([part.inputs for part in parts], 1), torch.cat([part.outputs for part in parts], 1))

    def apply(self, batch: Batch) -> Batch:
        """Return the batch in normalised units."""
        return Batch(self.inputs(batch.inputs), self.outputs(batch.outputs))

    def inputs(self, inputs: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return raw inputs, layers · d_in wide, in normalised units."""
        return self._by_layer(inputs, Normalisation.inputs)

    def outputs(self, outputs: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return raw outputs, layers · d_out wide, in normalised units."""
        return self._by_layer(outputs, Normalisation.outputs)

    def restore(self, outputs: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return normalised outputs, layers · d_out wide, in raw units."""
        return self._by_layer(outputs, Normalisation.restore)

    def _by_layer(self, rows: Tensor, change: Callable[[Normalisation, Tensor], Tensor]) -> Tensor:
        parts = rows.chunk(len(self.layers), -1)
        return torch.cat([change(layer, part) for layer, part in zip(self.layers, parts, strict=True)], -1)

    def to(self, device: torch.device, dtype: torch.dtype) -> JoinedNormalisation:
        """Return a copy whose means are on ``device`` in ``dtype``."""
        return JoinedNormalisation([layer.to(device, dtype) for layer in self.layers])


AnyNormalisation = Normalisation | JoinedNormalisation


def build_normalisation(kind: NormalisationKind, side_in: SiteStatistics, side_out: SiteStatistics) -> Normalisation:
    """Return the normalisation of a site from its cache statistics (``mean`` and population ``variance``, float64).

    ``standard`` subtracts the mean and divides by the root mean square of what is left; ``rms`` only divides by the
    root mean square of the raw values; ``none`` does nothing. After the first two, a row's mean squared norm is its
    width.
    """
    mean_in, scale_in = _centre_and_scale(kind, side_in)
    mean_out, scale_out = _centre_and_scale(kind, side_out)
    return Normalisation(torch.from_numpy(mean_in), scale_in, torch.from_numpy(mean_out), scale_out)


def _centre_and_scale(kind: NormalisationKind, side: SiteStatistics) -> tuple[np.ndarray, float]:
    mean = side.mean
    variance = side.variance
    if kind == "none":
        return np.zeros_like(mean), 1.0
    if kind == "rms":
        return np.zeros_like(mean), float(np.sqrt(np.mean(variance + mean**2)))
    return mean, float(np.sqrt(np.mean(variance)))


def check_statistics(site: str, sides: Mapping[Side, SiteStatistics]) -> None:
    """Refuse activations that cannot be normalised or learnt from.

    Raises NonFiniteActivation for a NaN or infinity, SettingsError if a side never varies.
    """
    for side, statistics in sides.items():
        if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.variance).all()):
            raise NonFiniteActivation(
                f"{site}/{side}: the cache's mean or variance is not finite, so some activation is not; "
                "verify the cache, then make it anew"
            )
    constant = [
        f"{site}/{side}"
        for side, statistics in sides.items()
        if statistics.variance.sum() <= CONSTANT * statistics.mean_square_norm
    ]
    if constant:
        raise SettingsError(
            f"{' and '.join(constant)}: all rows are equal to within rounding, so there is nothing to learn; "
            "cache more rows or another hook"
        )
