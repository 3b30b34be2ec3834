"""The settings of text: what is read, how it becomes contexts, and which of their positions become rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator, model_validator

from tailrace.pipeline.text.files import looks_local
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.storage.errors import SettingsError
from tailrace.storage.formats import LEFT_OUT
from tailrace.storage.settings import Quantity, Settings, Text

if TYPE_CHECKING:  # settings load no torch
    from tailrace.pipeline.model.language_model import LanguageModel

MIN_WINDOW = 16
"""Documents that a window holds at least, however long they are."""


class RowMask(Protocol):
    """Token ids and their marked documents (contexts, context_length) → which become rows, bool of the same shape."""

    def __call__(self, tokens: np.ndarray, documents: np.ndarray | None = None, /) -> np.ndarray:
        """Return the mask. Documents are needed where rows are chosen by role."""


class TextSettings(Settings):
    """Which text is read, and in which order."""

    help_sections: ClassVar = {"dataset": "Text"}

    dataset: str
    """Name of a dataset on the Hugging Face hub, or a local file, folder or quoted pattern of .txt, .jsonl, .json or
    .parquet files (.gz, .zst, .bz2 and .xz are read too)."""
    dataset_config: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub dataset; the newest commit if not given. The commit read is recorded."""
    column: str | None = None
    """Column that holds the text or the token ids; found by its name and type if not given."""
    text_unit: Literal["document", "paragraph", "line"] | None = None
    """What one document is in .txt files: the whole file (the default), a paragraph, or a line."""
    on_bad_row: Literal["fail", "skip"] = Field("fail", exclude=True)
    """What to do at a row that is no document, such as a null text or a line that is no JSON: stop, or go on and count
    it. May be changed until the run is finished."""
    shuffle_window: Quantity = 10_000
    """Documents are shuffled within windows of this many; 0 keeps the dataset's order."""

    @field_validator("shuffle_window")
    @classmethod
    def _check_window(cls, value: int) -> int:
        if value != 0 and value < MIN_WINDOW:
            raise ValueError(f"wanted 0 (no shuffling) or at least {MIN_WINDOW} documents")
        return value

    @model_validator(mode="after")
    def _check_hub_settings(self) -> Self:
        if not looks_local(self.dataset):
            return self
        given = {"dataset_config": self.dataset_config, "dataset_revision": self.dataset_revision}
        misplaced = [name for name, value in given.items() if value is not None]
        misplaced += ["split"] if self.split != "train" else []
        if misplaced:
            raise ValueError(f"{', '.join(misplaced)} is for hub datasets, but {self.dataset!r} is local; leave it out")
        return self


class RowFilter(Settings):
    """Which token positions are cached.

    The BOS at position 0 is left out unless asked for: models put activations there that are hundreds of times larger
    than elsewhere and the same in every context.
    """

    help_sections: ClassVar = {"exclude": "Which rows"}

    exclude: Literal["bos", "special", "none"] = "bos"
    """Tokens left out: the BOS that begins each context, every special token (BOS, separators, …), or none."""
    first_position: NonNegativeInt = 0
    """Positions before this one are left out as well."""
    roles: str | None = Field(None, exclude_if=lambda value: value is None)
    """Of conversations, only what messages by these roles say: assistant, or several as assistant,tool. All of a
    conversation is context still."""

    @field_validator("roles")
    @classmethod
    def _check_roles(cls, value: str | None) -> str | None:
        if value is None:
            return None
        roles = {role.strip() for role in value.split(",")}
        if "" in roles:
            raise ValueError("wanted the names of roles, such as assistant or assistant,tool")
        return ",".join(sorted(roles))

    def row_mask(self, context_length: int, special_token_ids: Collection[int] = ()) -> RowMask:
        """Return the mask of these positions, for contexts of one length.

        Raises SettingsError if no position is left, or if special tokens are to be left out and none is known.
        """
        # the BOS is said by no role
        start = max(self.first_position, 0 if self.exclude == "none" and self.roles is None else 1)
        if start >= context_length:
            raise SettingsError(
                f"first_position={self.first_position} leaves no row in contexts of {context_length} tokens; "
                f"lower it to at most {context_length - 1}"
            )
        if self.exclude == "special" and not special_token_ids:
            raise SettingsError("exclude=special: this model's tokenizer names no special token; use exclude=bos")
        special = np.array(sorted(special_token_ids) if self.exclude == "special" else [], dtype=np.int64)

        def mask(tokens: np.ndarray, documents: np.ndarray | None = None, /) -> np.ndarray:
            kept = (np.arange(tokens.shape[1]) >= start) & ~np.isin(tokens, special)
            if self.roles is None:
                return kept
            assert documents is not None, "token ids do not say by which role they are"
            return np.asarray(kept & (documents < LEFT_OUT))

        return mask


class CapturedContexts(RowFilter):
    """How text becomes contexts, and contexts become rows."""

    context_length: int = 128
    """Tokens per context, the BOS that begins it included."""
    special_tokens: Literal["text", "markup"] = Field("text", exclude_if=lambda value: value == "text")
    """What the name of a special token in a text, such as </s>, is: letters like any, or that token."""
    token_rows: Literal["auto", "documents", "contexts", "pieces"] = Field(
        "auto", exclude_if=lambda value: value == "auto"
    )
    """What a row of token ids is: a document, which a separator then ends; a context made beforehand, taken as it is;
    or a piece of longer text. auto: contexts or pieces where the first rows have one length, else documents."""
    contexts_per_batch: int = 32
    """Contexts per pass of the language model; a cache made on a GPU takes as many as 16,384 tokens make, unless it is
    given. Part of a cache's identity: a row's last bits depend on it."""
    holdout: Text = "0.01"
    """Documents held out for evaluation: a share such as 0.01 or 1%, indices such as 7::20 or 3,17, or 0 for none."""
    seed: int = 0
    """Decides the order of documents, the held-out ones, and the order of rows."""

    @field_validator("contexts_per_batch")
    @classmethod
    def _check_batch(cls, value: int) -> int:
        if value < 1:
            raise ValueError("wanted at least 1")
        return value

    @field_validator("holdout")
    @classmethod
    def _check_holdout(cls, value: str) -> str:
        try:
            HoldoutRule.parse(value)
        except SettingsError as error:
            raise ValueError(str(error).removeprefix("holdout: ")) from error
        return value

    # Problems between settings belong to the later one of them, so that they are reported together with all others:
    # pydantic would check the whole only where every single setting is right.

    @field_validator("context_length")
    @classmethod
    def _check_context(cls, value: int, info: ValidationInfo) -> int:
        if not 2 <= value <= 65536:
            raise ValueError("wanted 2 (BOS and a token) to 65,536")
        if info.data.get("first_position", 0) >= value:
            raise ValueError(f"wanted more than first_position ({info.data['first_position']}), or no row is left")
        return value

    def rows_of(self, model: LanguageModel) -> RowMask:
        """Return which positions of this model's contexts are rows."""
        return self.row_mask(self.context_length, model.special_token_ids)
