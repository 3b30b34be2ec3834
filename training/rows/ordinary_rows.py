"""Training on ordinary rows alone: those whose vectors are not many times longer than most.

Some layers of most language models write vectors of a hundred times the usual length on a few tokens (Sun et al. 2024,
"Massive activations in large language models"). Squared error and variance are then those tokens' alone: a transcoder
fits them first and says nothing of all others. Leaving them out leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool
from torch import Tensor

from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import RowSource

STATISTICS_ROWS = 65_536
"""Rows drawn for the mean and variance of ordinary rows: their standard error is 0.4 % of a deviation."""


@dataclass(frozen=True)
class OrdinaryRows:
    """The rows whose input and output are at most so long."""

    longest_in: float
    longest_out: float

    @classmethod
    def within(cls, multiple: float, statistics: Mapping[Side, SiteStatistics]) -> Self:
        """Return the rows of at most ``multiple`` median norms on either side; medians are known within 9 %."""
        sides = list(statistics.values())
        return cls(multiple * sides[0].median_norm, multiple * sides[-1].median_norm)

    def mask(self, batch: Batch) -> Bool[Tensor, " rows"]:
        """Return which rows these are."""
        is_short_in: Tensor = torch.linalg.vector_norm(batch.inputs, dim=1) <= self.longest_in
        is_short_out: Tensor = torch.linalg.vector_norm(batch.outputs, dim=1) <= self.longest_out
        return is_short_in & is_short_out

    def statistics(self, site: str, sides: tuple[Side, ...], source: RowSource) -> dict[Side, SiteStatistics]:
        """Return the statistics of ordinary rows by side, from a sample of rows that ``source`` draws.

        Raises SettingsError if none of them is ordinary.
        """
        drawn = source(STATISTICS_ROWS, 0).batch
        mask = self.mask(drawn)
        batch = Batch(drawn.inputs[mask], drawn.outputs[mask])
        if not len(batch.inputs):
            raise SettingsError(
                f"{site}: max_norm_multiple: no row is at most {self.longest_in:.4g} (input) and "
                f"{self.longest_out:.4g} (output) long; raise it"
            )
        by_side: dict[Side, SiteStatistics] = {}
        for side, rows in zip(sides, (batch.inputs, batch.outputs), strict=False):
            by_side[side] = SiteStatistics(rows.shape[1])
            by_side[side].add(rows.cpu().numpy())
        return by_side


def massive_warning(site: str, outputs: SiteStatistics, multiple: float | None) -> str | None:
    """Return a sentence if a few rows' outputs would decide everything, and no ``multiple`` of the median leaves them
    out; else None."""
    note = outputs.massive_note()
    if multiple is not None or note is None:
        return None
    return f"{site} has massive activations: {note}; max_norm_multiple 10 would leave such rows out"
