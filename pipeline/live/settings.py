"""The settings of live mode: everything that decides which rows training sees, and in which order."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tailrace.pipeline.cache.settings import CapturedSites
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.text.settings import CapturedContexts, TextSettings
from tailrace.storage.settings import Quantity


# As for a cache: pydantic lists the fields of the last base first.
class LiveSettings(CapturedContexts, CapturedSites, TextSettings, ModelSettings):
    """Which model's activations on which text, and how they are mixed in memory. No row is written to disk."""

    help_sections: ClassVar = {"storage_dtype": "Buffer"}

    storage_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """How activations are kept in the buffer; auto is what a cache would be stored as."""
    heldout_rows: Quantity = Field(default=16_384, ge=1)
    """Held-out rows kept in memory at most."""
    buffer_rows: Quantity = Field(default=262_144, ge=4)
    """Rows among which a batch is drawn: half of them from newer text than the other half."""
    buffer_bytes: Quantity = Field(default=4_000_000_000, ge=1)
    """Memory the buffer may take; buffer_rows is lowered to fit. A buffered row takes 1.5 times its stored size."""


class FreshText(CapturedContexts, TextSettings):
    """Text that a language model is run over for the purpose."""

    holdout: str = "0"
    """Documents left out, such as those known from training: a share, indices such as 7::20, or 0 for none."""
