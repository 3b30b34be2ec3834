"""The k largest pre-activations of a row survive, so L0 is a setting and no penalty is needed.

ReLU comes before the choice: of a row with fewer than k positive pre-activations, fewer than k features fire
(Gao et al. 2024, section 2.3).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Entries, LargestPerRow, restrict
from tailrace.training.architectures.settings import TopK


class TopKTranscoder(Transcoder):
    """``TopK(max(0, W_enc x + b_enc))``."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: TopK) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=settings.input_bias, skip=settings.skip)
        self._settings = settings
        self.k = settings.k

    def begin_step(self, step: int) -> None:
        """Take k towards its final value."""
        self.k = self._settings.k_in(step)

    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the pre-activations with all but the k largest positive ones of each row set to zero."""
        rows = pre_activations.reshape(-1, pre_activations.shape[-1])
        return restrict(rows, LargestPerRow(self._settings.k)).relu().view_as(pre_activations)

    def selection_in_use(self) -> LargestPerRow:
        """Return the final k largest of each row."""
        return LargestPerRow(self._settings.k)

    def selection(self) -> LargestPerRow:
        """Return the k largest of each row."""
        return LargestPerRow(self.k)

    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the positive part of what was selected."""
        return entries.pre.relu()


def build(settings: TopK, d_in: int, d_out: int, d_sae: int) -> TopKTranscoder:
    """Return the module with all weights zero."""
    return TopKTranscoder(d_in, d_out, d_sae, settings=settings)
