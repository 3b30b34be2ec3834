"""The settings of ``pipeline cache``: everything that decides what the cache holds. Live mode shares some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.text.settings import CapturedContexts, TextSettings
from tailrace.storage.formats import RESERVED_COLUMNS, Compression
from tailrace.storage.settings import Quantity, Settings, Text

TOKENS_PER_GPU_BATCH = 1 << 14
"""Tokens of a pass of the language model on a GPU: fewer leave it idle while the host asks for the next kernel."""


def _at_least_1(value: int) -> int:
    if value < 1:
        raise ValueError("wanted at least 1")
    return value


class CapturedSites(Settings):
    """Which hooks of the model rows are taken from."""

    help_sections: ClassVar = {"layers": "Which rows"}

    layers: Text | None = None
    """Layers whose MLPs' inputs and outputs are taken, such as 8, 0,3,8-11 or all."""
    hooks: tuple[str, ...] = Field(default=(), validate_default=True)
    """Sites by hook names: NAME=IN_HOOK:OUT_HOOK, IN_HOOK:OUT_HOOK, or one HOOK for an SAE; HOOK[H] is head H of an
    attention hook. May be repeated."""

    @field_validator("hooks")
    @classmethod
    def _check_sites(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and info.data.get("layers", "") is None:
            raise ValueError("no layer and no hook is given: use --layers (such as 8, or all) or --hooks")
        return value


class CacheLayout(Settings):
    """How activations lie on disk."""

    help_sections: ClassVar = {"storage_dtype": "On disk"}

    storage_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """Stored dtype. auto: bfloat16 for a bfloat16 model; otherwise float16 where a probe of the first batches stays
    below 8192 and no row below 6e-5, else bfloat16. int8 keeps a scale per row and per column: a quarter of float32,
    FVU below 1e-4."""
    compression: Compression = "none"
    """Lossless compression; slower than a local disk, worth it on slow or network storage."""
    shard_rows: int | Literal["auto"] = "auto"
    """Rows per shard, which is also the unit of shuffling and of resuming; a multiple of chunk_rows."""
    chunk_rows: int | Literal["auto"] = "auto"
    """Rows per inner chunk, the smallest piece other Zarr programs read at once."""
    bucket_rows: int | Literal["auto"] = "auto"
    """Rows shuffled together in memory when reading; auto keeps each piece read from disk large."""
    keep_columns: str | None = Field(None, exclude_if=lambda value: value is None)
    """Columns of the dataset to keep for every document, such as id,source,lang: texts, numbers, true or false.
    Queries and dashboards then show them."""

    @field_validator("keep_columns")
    @classmethod
    def _check_kept(cls, value: str | None) -> str | None:
        if value is None:
            return None
        names = [name.strip() for name in value.split(",")]
        if "" in names:
            raise ValueError("wanted the names of columns, such as id or id,source,lang")
        if taken := [name for name in names if name.lower() in RESERVED_COLUMNS]:
            raise ValueError(f"{' and '.join(taken)} is a column of the table already; give it another name")
        return ",".join(dict.fromkeys(names))

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns to keep, in order."""
        return tuple(self.keep_columns.split(",")) if self.keep_columns else ()


class WantedRows(Settings):
    """How many rows to write."""

    help_sections: ClassVar = {"tokens": "Which rows"}

    tokens: Quantity | Literal["all"]
    """Training rows to write, such as 60M: one row per token that is kept; ``all`` takes the whole dataset. May be
    changed until the cache is finished; afterwards ``pipeline extend`` adds rows."""


# Pydantic lists the fields of the last base first. What every command line has comes first in the help.
class CacheSettings(CacheLayout, CapturedContexts, CapturedSites, WantedRows, TextSettings, ModelSettings):
    """Which model's activations on which text, and how they lie on disk."""

    help_basics: ClassVar = (
        *("model", "dataset", "tokens", "layers", "hooks"),
        *("context_length", "exclude", "holdout", "storage_dtype", "seed"),
    )

    @field_validator("tokens", "shard_rows", "chunk_rows", "bucket_rows")
    @classmethod
    def _check_positive(cls, value: int | str) -> int | str:
        return _at_least_1(value) if isinstance(value, int) else value

    # A problem between two settings belongs to the later one, as above.

    @field_validator("chunk_rows")
    @classmethod
    def _check_chunks(cls, value: int | str, info: ValidationInfo) -> int | str:
        shard_rows = info.data.get("shard_rows")
        if isinstance(shard_rows, int) and isinstance(value, int) and shard_rows % max(1, value):
            raise ValueError(f"wanted a divisor of shard_rows ({shard_rows})")
        return value

    @field_validator("bucket_rows")
    @classmethod
    def _check_buckets(cls, value: int | str, info: ValidationInfo) -> int | str:
        shard_rows = info.data.get("shard_rows")
        if isinstance(value, int) and shard_rows == "auto":
            raise ValueError("give shard_rows too, of which it is a multiple")
        if isinstance(value, int) and isinstance(shard_rows, int) and value % max(1, shard_rows):
            raise ValueError(f"wanted a multiple of shard_rows ({shard_rows})")
        return value

    def for_device(self, device: str, begun: Mapping[str, Any]) -> Self:
        """Return settings whose batch, unless it is given, is as large as the device wants it.

        ``begun``: the request of a cache that lies at the same path already. It keeps the batch that it was begun with
        by default, on whatever device.
        """
        if "contexts_per_batch" in self.model_fields_set:
            return self
        on_gpu = max(self.contexts_per_batch, TOKENS_PER_GPU_BATCH // self.context_length)
        chosen = begun.get("contexts_per_batch")
        if chosen not in (self.contexts_per_batch, on_gpu):
            chosen = on_gpu if device.startswith("cuda") else self.contexts_per_batch
        return self.model_copy(update={"contexts_per_batch": chosen})

    def request(self) -> dict[str, Any]:
        """Return what identifies the cache: every setting but how many rows, which may grow."""
        return self.model_dump(mode="json", exclude={"tokens"})
