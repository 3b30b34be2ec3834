"""BatchTopK whose first features must reconstruct by themselves: nested dictionaries, the coarse ones first.

The loss is the mean over prefixes of the dictionary of how well that prefix alone reconstructs, all from one choice of
active features (Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", section 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tailrace.training.architectures.base import Trace, exact
from tailrace.training.architectures.batch_topk import BatchTopKTranscoder
from tailrace.training.architectures.entries import Entries
from tailrace.training.architectures.objectives import Objective
from tailrace.training.architectures.topk import SelectsLargest
from tailrace.training.rows.batches import Batch


class MatryoshkaTranscoder(BatchTopKTranscoder):
    """BatchTopK with ``reconstruction`` averaged over the prefixes that end at ``ends``."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: Matryoshka) -> None:
        super().__init__(d_in, d_out, d_sae, settings=settings)
        self.ends = settings.ends(d_sae)

    def trace(self, entries: Entries, batch: Batch, objective: Objective) -> Trace:
        """Return the outputs of the whole dictionary and the mean loss over prefixes."""
        activations = self.activation(entries)
        constant = self.unexplained(batch.inputs)
        by_prefix = entries.decode_groups(activations, self.W_dec, self.ends).cumsum(0) + constant
        losses = [objective.reconstruction(exact(outputs, batch.outputs), batch.outputs) for outputs in by_prefix]
        return Trace(by_prefix[-1], activations, {"reconstruction": torch.stack(losses).mean()})


class Matryoshka(SelectsLargest):
    """BatchTopK over nested dictionaries."""

    kind: Literal["matryoshka"] = "matryoshka"
    levels: int = Field(default=5, ge=1)
    """Number of nested dictionaries; each is half of the next."""

    def ends(self, d_sae: int) -> tuple[int, ...]:
        """Return the number of features of each level, smallest first."""
        return tuple(max(1, d_sae >> level) for level in reversed(range(self.levels)))

    def problems(self, d_sae: int) -> list[str]:
        """Return a sentence for each setting that does not fit ``d_sae`` features."""
        problems = super().problems(d_sae)
        if d_sae >> (self.levels - 1) < 1:
            problems.append(
                f"architecture.levels: d_sae = {d_sae} cannot be halved {self.levels - 1} times; lower levels"
            )
        return problems

    def build(self, d_in: int, d_out: int, d_sae: int) -> MatryoshkaTranscoder:
        """Return the module with all weights zero."""
        return MatryoshkaTranscoder(d_in, d_out, d_sae, settings=self)
