"""The settings of text: which documents are read, and in which order."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from tailrace.pipeline.text.files import looks_local
from tailrace.storage.settings import Quantity, Settings

MIN_WINDOW = 16
"""Documents that a window holds at least, however long they are."""


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
