"""Rows of several layers side by side, every layer in its own units.

Layers differ in scale by orders of magnitude; each is normalised by its own mean and scale, so that the loss is the
mean of the layers' FVU. A row is one token at all layers; it is left out if it is too long at any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.rows.batches import Batch, BatchStream, SiteBatches
from tailrace.training.rows.normalisation import Normalisation
from tailrace.training.rows.ordinary_rows import OrdinaryRows

JOINED = "all layers"
"""What the joined rows are called among the batches of sites."""


@dataclass(frozen=True)
class LayerUnits:
    """The normalisation of every layer."""

    layers: Sequence[Normalisation]

    @property
    def scales_in(self) -> list[float]:
        """One number a layer."""
        return [one.scale_in for one in self.layers]

    @property
    def scales_out(self) -> list[float]:
        """One number a layer."""
        return [one.scale_out for one in self.layers]

    @cached_property
    def means_in(self) -> list[Tensor]:
        """(width_in,) float64 a layer."""
        return [one.mean_in.double().cpu() for one in self.layers]

    def joined(self, batches: Sequence[Batch]) -> Batch:
        """Return the layers' raw batches, normalised, side by side."""
        parts = [one.apply(batch) for one, batch in zip(self.layers, batches, strict=True)]
        return Batch(torch.cat([part.inputs for part in parts], 1), torch.cat([part.outputs for part in parts], 1))

    def restore(self, outputs: Tensor) -> Tensor:
        """Return normalised outputs (…, d_out) of all layers in raw units."""
        parts = outputs.view(*outputs.shape[:-1], len(self.layers), -1)
        return torch.stack([one.restore(parts[..., layer, :]) for layer, one in enumerate(self.layers)], -2).flatten(-2)

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerUnits:
        """Return a copy whose means are on ``device`` in ``dtype``."""
        return LayerUnits([one.to(device, dtype) for one in self.layers])


class JoinedRows:
    """Makes one batch of the batches of all layers, lowest first."""

    def __init__(self, sites: Sequence[Site], units: LayerUnits, ordinary: Mapping[str, OrdinaryRows]) -> None:
        self._sites, self._units, self._ordinary = sites, units, ordinary

    def mask(self, batches: SiteBatches) -> Tensor:
        """Return bool (rows,): which are ordinary at every layer."""
        raw = [batches[site.name] for site in self._sites]
        if not self._ordinary:
            return torch.ones(len(raw[0].inputs), dtype=torch.bool, device=raw[0].inputs.device)
        masks = [self._ordinary[site.name].mask(batch) for site, batch in zip(self._sites, raw, strict=True)]
        return torch.stack(masks).all(0)

    def __call__(self, batches: SiteBatches) -> Batch:
        """Return the rows that are ordinary at every layer, normalised, side by side; there may be none."""
        raw = [batches[site.name] for site in self._sites]
        if self._ordinary and not bool((mask := self.mask(batches)).all()):
            raw = [Batch(batch.inputs[mask], batch.outputs[mask]) for batch in raw]
        return self._units.joined(raw)


class JoinedBatches:
    """A stream of the layers' batches as one of joined rows."""

    def __init__(self, stream: BatchStream, joined: JoinedRows) -> None:
        self._stream, self._joined = stream, joined

    def next_batch(self) -> dict[str, Batch]:
        """Return the next batch of all layers. Raises SettingsError if no row of it may be learnt from."""
        batch = self._joined(raw := self._stream.next_batch())
        if not len(batch.inputs):
            n_rows = len(next(iter(raw.values())).inputs)
            raise SettingsError(
                f"max_norm_multiple leaves none of {n_rows} rows to learn from: each is too long at some layer; raise "
                "it, or batch_rows"
            )
        return {JOINED: batch}

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        self._stream.load_state_dict(state)
