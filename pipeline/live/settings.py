"""The settings of live mode: everything that decides which rows training sees, and in which order."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from pipeline.caching.rows import RowFilter
from pipeline.model.language_model import ModelSettings
from pipeline.text.dataset import TextSettings
from pipeline.text.holdout import HoldoutRule
from storage.errors import SettingsError
from storage.settings import Quantity


def _as_text(value: Any) -> Any:
    """Read a single layer of a YAML file, which is a number there, as the text it would be on the command line."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LiveSettings(ModelSettings, TextSettings, RowFilter):
    """Which model's activations on which text, and how they are mixed in memory. No row is written to disk."""

    layers: Annotated[str | None, BeforeValidator(_as_text)] = None
    """Layers whose MLPs are seen, such as 8, 0,3,8-11 or all."""
    hooks: tuple[str, ...] = Field(default=(), validate_default=True)
    """Sites by hook names: NAME=IN_HOOK:OUT_HOOK, IN_HOOK:OUT_HOOK, or one HOOK for an SAE. May be repeated."""
    context_length: int = 128
    """Tokens per context, the BOS that begins it included."""
    contexts_per_batch: int = Field(default=32, ge=1)
    """Contexts per pass of the language model. A row's last bits depend on it."""
    storage_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """How activations are kept in the buffer; auto is what a cache would be stored as."""
    holdout: str = "0.01"
    """Documents held out for evaluation: a share such as 0.01 or 1%, indices such as 7::20 or 3,17, or 0 for none."""
    heldout_rows: Quantity = Field(default=16_384, ge=1)
    """Held-out rows kept in memory at most."""
    buffer_rows: Quantity = Field(default=262_144, ge=4)
    """Rows among which a batch is drawn: half of them from newer text than the other half."""
    buffer_bytes: Quantity = Field(default=4_000_000_000, ge=1)
    """Memory the buffer may take; buffer_rows is lowered to fit. A buffered row takes 1.5 times its stored size."""
    seed: int = 0
    """Decides the order of documents, the held-out ones, and the mixing."""

    @field_validator("holdout")
    @classmethod
    def _check_holdout(cls, value: str) -> str:
        try:
            HoldoutRule.parse(value)
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return value

    # As in CacheSettings, problems between settings belong to the later one, so that all are reported together.

    @field_validator("hooks")
    @classmethod
    def _check_sites(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and info.data.get("layers", "") is None:
            raise ValueError("nothing to train on: give --layers (such as 8, or all) or --hooks")
        return value

    @field_validator("context_length")
    @classmethod
    def _check_context(cls, value: int, info: ValidationInfo) -> int:
        if not 2 <= value <= 65536:
            raise ValueError("wanted 2 (BOS and a token) to 65,536")
        if info.data.get("first_position", 0) >= value:
            raise ValueError(f"wanted more than first_position ({info.data['first_position']}), or no row is left")
        return value
