"""BatchTopK whose first features must reconstruct by themselves: nested dictionaries, the coarse ones first.

The loss is the mean over prefixes of the dictionary of how well that prefix alone reconstructs, all from one choice of
active features (Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", section 3).
"""

from __future__ import annotations

import torch

from tailrace.training.architectures.base import Trace, exact
from tailrace.training.architectures.batch_topk import BatchTopKTranscoder
from tailrace.training.architectures.entries import Entries
from tailrace.training.architectures.objectives import Objective
from tailrace.training.architectures.settings import Matryoshka
from tailrace.training.rows.batches import Batch


class MatryoshkaTranscoder(BatchTopKTranscoder):
    """BatchTopK with ``reconstruction`` averaged over the prefixes that end at ``ends``."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: Matryoshka) -> None:
        super().__init__(d_in, d_out, d_sae, settings=settings)
        self.ends = settings.ends(d_sae)
        self._ends_of = settings.ends

    def become_slice(self, first: int, d_sae: int) -> None:
        """Take the part of each prefix that is at hand, which may be none or all."""
        self.ends = tuple(min(max(end - first, 0), self.d_sae) for end in self._ends_of(d_sae))

    def trace(self, entries: Entries, batch: Batch, objective: Objective) -> Trace:
        """Return the outputs of the whole dictionary and the mean loss over prefixes."""
        activations = self.activation(entries)
        constant = self.unexplained(batch.inputs)
        by_level = entries.reductions.over_features(entries.decode_groups(activations, self.W_dec, self.ends))
        by_prefix = by_level.cumsum(0) + constant
        losses = [objective.reconstruction(exact(outputs, batch.outputs), batch.outputs) for outputs in by_prefix]
        return Trace(by_prefix[-1], activations, {"reconstruction": torch.stack(losses).mean()})


def build(settings: Matryoshka, d_in: int, d_out: int, d_sae: int) -> MatryoshkaTranscoder:
    """Return the module with all weights zero."""
    return MatryoshkaTranscoder(d_in, d_out, d_sae, settings=settings)
