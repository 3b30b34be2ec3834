"""The rows that a transcoder learns from: the ordinary rows of its sites, normalised, the sites side by side.

A cross-layer transcoder has several sites, and a row of its batch is one token at all of them. Layers differ in scale
by orders of magnitude, so each is normalised by its own mean and scale: the loss is the mean of the layers' FVU. A row
is left out if it is too long at any site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tailrace.training.rows.batches import Batch, SiteBatches
from tailrace.training.rows.normalisation import AnyNormalisation, JoinedNormalisation
from tailrace.training.rows.ordinary_rows import OrdinaryRows
from tailrace.training.rows.row_source import RowSource, SampledRows


class LearntRows:
    """Makes a run's batch of the batches of its sites, lowest layer first."""

    def __init__(
        self,
        sites: Sequence[str],
        normalisation: AnyNormalisation,
        ordinary: Mapping[str, OrdinaryRows] | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.normalisation = normalisation
        """From raw rows, side by side, to normalised ones."""
        self.ordinary = dict(ordinary or {})
        """The rows that are learnt from, by site; empty: all rows."""

    def to(self, device: torch.device, dtype: torch.dtype) -> LearntRows:
        """Return a copy for rows that lie on ``device`` in ``dtype``."""
        return LearntRows(self.sites, self.normalisation.to(device, dtype), self.ordinary)

    def mask(self, raw: Sequence[Batch]) -> Bool[Tensor, " rows"] | None:
        """Return which rows of each site's batches are ordinary at every site; None if all rows are learnt from."""
        if not self.ordinary:
            return None
        return torch.stack([self.ordinary[site].mask(batch) for site, batch in zip(self.sites, raw, strict=True)]).all(
            0
        )

    def __call__(self, batches: SiteBatches) -> Batch:
        """Return the ordinary rows, normalised, (rows, sites · width); there may be none."""
        raw = [batches[site] for site in self.sites]
        mask = self.mask(raw)
        if mask is not None:
            ordinary = mask.nonzero().flatten()  # how many there are is the only number that a GPU is waited for
            if len(ordinary) < len(mask):
                raw = [Batch(*(side.index_select(0, ordinary) for side in batch)) for batch in raw]
        if isinstance(self.normalisation, JoinedNormalisation):
            return self.normalisation.join(raw)
        return self.normalisation.apply(raw[0])

    def source(self, sources: Sequence[RowSource]) -> RowSource:
        """Return a source of the ordinary rows, raw, side by side: a few less than it is asked for.

        ``sources`` draw the same rows at each site.
        """

        def draw(n_rows: int, step: int) -> SampledRows:
            drawn = [source(n_rows, step) for source in sources]
            mask = self.mask([rows.batch for rows in drawn])
            return _joined(drawn, None if mask is None or bool(mask.all()) else mask)

        return draw


def _joined(drawn: Sequence[SampledRows], mask: Tensor | None) -> SampledRows:
    """Return the rows of ``mask`` at all sites side by side; None: all rows."""
    first = drawn[0]
    inputs, outputs = (
        sides[0] if len(sides) == 1 else torch.cat(sides, 1)
        for sides in zip(*(rows.batch for rows in drawn), strict=True)
    )
    if mask is None:
        return SampledRows(Batch(inputs, outputs), first.context, first.position)
    on_host: np.ndarray = mask.cpu().numpy()
    where = (None if values is None else values[on_host] for values in (first.context, first.position))
    return SampledRows(Batch(inputs[mask], outputs[mask]), *where)
