"""The settings of ``pipeline evaluate``, and what ``pipeline pareto`` compares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tailrace.storage.settings import Quantity, Settings

Measure = Literal["fvu", "ce_recovered"]
"""What stands against L0."""


class EvaluateSettings(Settings):
    """On which contexts to run the model."""

    split: Literal["heldout", "train"] = "heldout"
    """Contexts to run: heldout (documents the transcoders never saw) or train."""

    contexts: Quantity = Field(default=256, gt=0)
    """Contexts to run, a uniform sample; all of the split's if it has no more. Each is run 4 times per transcoder,
    and 3 times more for several at once."""

    contexts_per_batch: int = Field(default=16, gt=0)
    """Contexts per pass of the language model. Memory: twice the logits of a batch, 2 × 410 MB for 16 contexts of 128
    tokens and 50,000 tokens of vocabulary in float32."""

    seed: int = 0
    """Decides which contexts are run."""
