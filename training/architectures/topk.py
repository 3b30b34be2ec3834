"""The k largest pre-activations of a row survive, so L0 is a setting and no penalty is needed.

ReLU comes before the choice: of a row with fewer than k positive pre-activations, fewer than k features fire
(Gao et al. 2024, section 2.3).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from tailrace.training.architectures.base import Architecture, Transcoder
from tailrace.training.architectures.entries import Entries, LargestPerRow, restrict


class TopKTranscoder(Transcoder):
    """``TopK(max(0, W_enc x + b_enc))``."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: TopK) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=settings.input_bias, skip=settings.skip)
        self._settings = settings
        self.k = settings.k

    def begin_step(self, step: int) -> None:
        """Take k towards its final value."""
        self.k = self._settings.k_in(step)

    def activate(self, pre_activations: Tensor) -> Tensor:
        """Return the pre-activations with all but the k largest positive ones of each row set to zero."""
        rows = pre_activations.reshape(-1, pre_activations.shape[-1])
        return restrict(rows, LargestPerRow(self._settings.k)).relu().view_as(pre_activations)

    def selection_in_use(self) -> LargestPerRow:
        """Return the final k largest of each row."""
        return LargestPerRow(self._settings.k)

    def selection(self) -> LargestPerRow:
        """Return the k largest of each row."""
        return LargestPerRow(self.k)

    def activation(self, entries: Entries) -> Tensor:
        """Return the positive part of what was selected."""
        return entries.pre.relu()


class SelectsLargest(Architecture):
    """Settings of the architectures that choose the largest activations."""

    k: int = Field(default=64, ge=1)
    """Features that fire on one row (batch_topk, matryoshka: on average)."""
    k_start: int | None = Field(default=None, ge=1)
    """Start with this many and go linearly to k over k_warmup_steps."""
    k_warmup_steps: int = Field(default=1000, ge=1)
    """Steps from k_start to k."""

    def k_in(self, step: int) -> int:
        """Return k in ``step``, counted from 0."""
        if self.k_start is None or step >= self.k_warmup_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_warmup_steps)

    def problems(self, d_sae: int) -> list[str]:
        """Return a sentence for each of k and k_start that exceeds the number of features."""
        wanted = {"k": self.k, "k_start": self.k_start or 1}
        return [
            f"architecture.{name}: {k} features per row cannot be chosen from d_sae = {d_sae}; "
            f"lower {name} or raise d_sae"
            for name, k in wanted.items()
            if k > d_sae
        ]


class TopK(SelectsLargest):
    """The k largest features of each row."""

    kind: Literal["topk"] = "topk"

    def build(self, d_in: int, d_out: int, d_sae: int) -> TopKTranscoder:
        """Return the module with all weights zero."""
        return TopKTranscoder(d_in, d_out, d_sae, settings=self)
