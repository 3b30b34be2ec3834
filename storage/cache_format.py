"""Paths and arrays of an activation cache; no other module knows them.

``docs/format.md`` is the normative description; a test holds the two together.

Names of hooks as they are recorded: a hook point of the model, or an attention head's slice of it.

``blocks.3.attn.hook_z`` is all of the point and ``blocks.3.attn.hook_z[5]`` its head 5. Nothing here knows a model,
so nothing here checks that it has such a point or head.
"""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from pydantic import Field, TypeAdapter, model_serializer, model_validator
from pydantic.dataclasses import dataclass

from tailrace.storage.artifact import JSON, KEEPING, Count, FileRecord, Manifest, ModelIdentity, Record
from tailrace.storage.formats import ARTIFACT_FORMATS, Compression
from tailrace.storage.layout import ArraySpec, Encoding, Side
from tailrace.storage.shuffle import EpochPlan
from tailrace.storage.statistics import StatisticsRecord

_ONE_HEAD = re.compile(r"([^\[\]]+?)\s*\[\s*([+-]?[0-9]{1,18})\s*\]")


class HookName(NamedTuple):
    """A hook point by name, and which head of it is meant."""

    point: str
    """Name of the point; a malformed name is kept here, brackets included, and no model has it."""
    head: int | None
    """Index of the head, from 0; None for all of the point. As written, so possibly no valid index: -1."""

    @classmethod
    def parse(cls, name: str) -> HookName:
        """Read ``HOOK`` or ``HOOK[H]``."""
        match = _ONE_HEAD.fullmatch(name)
        return cls(name, None) if match is None else cls(match[1], int(match[2]))

    @property
    def layer(self) -> int | None:
        """The layer whose block the point is in; None outside all blocks."""
        first, _, rest = self.point.partition(".")
        number = rest.partition(".")[0]
        return int(number) if first == "blocks" and re.fullmatch(r"\d{1,9}", number) else None

    def __str__(self) -> str:
        return self.point if self.head is None else f"{self.point}[{self.head}]"


Size = Annotated[int, Field(ge=1, lt=2**40)]
"""A width, or a number of rows that are read together."""
KIND = "activation-cache"
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
SPLITS = ("train", "heldout")
PROVENANCE: dict[str, str] = {"token_id": "int32", "context": "uint32", "position": "uint16", "document": "uint32"}
"""One number per row each: the token, its context, its position there, and the document it comes from."""
CONTEXT_ARRAYS: dict[str, str] = {"tokens": "int32", "documents": "uint32"}
"""One vector of context_length numbers per context each."""
VOCABULARY = "vocabulary.json"
CHUNK_CONTEXTS = 256
"""Contexts per inner chunk of the context arrays; a shard of more contexts has a multiple of them."""
EPOCH_KIND = "shuffled-epoch"
EPOCHS = "epochs"
"""Folder of the materialised epochs."""
DRAFT = "draft"
"""Folder of what only an unfinished draft needs."""
BEGUN = "draft/begun.json"
"""What is made there and from what, written before anything else."""


@dataclass(frozen=True, config=KEEPING)
class Site:
    """One pair of hooks whose activations are cached; an SAE site has the same hook on both sides."""

    name: str
    hook_in: str
    hook_out: str
    d_in: Size
    d_out: Size
    dtype: Annotated[str, Field(pattern="^(bfloat16|float16|float32|int8)$")]
    """Storage dtype."""

    @property
    def layer(self) -> int | None:
        """The layer that both hooks name; None if they name none or two."""
        layers = {HookName.parse(name).layer for name in (self.hook_in, self.hook_out)}
        return layers.pop() if len(layers) == 1 else None

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that are stored: one where both hooks are the same."""
        return ("in",) if self.hook_in == self.hook_out else ("in", "out")

    def width(self, side: Side) -> int:
        """Return d_in or d_out."""
        return self.d_in if side == "in" else self.d_out

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row, both sides."""
        item = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]
        return sum(self.width(side) * item + (4 if self.dtype == "int8" else 0) for side in self.sides)

    @model_serializer
    def as_json(self) -> dict[str, JSON]:
        """Return the site as JSON, with keys that this version does not know."""
        return dict(vars(self))


@dataclass(frozen=True, config=KEEPING)
class CacheFormat:
    """Everything that fixes the arrays of a cache apart from how many rows they have."""

    sites: tuple[Site, ...]
    context_length: Size
    shard_rows: Size
    chunk_rows: Size
    compression: Compression
    block_contexts: Size
    """Contexts per shard of the context arrays."""
    column_scales: dict[str, list[float]] = field(default_factory=dict)
    """``site/side`` → float32 column scale; int8 sites only."""

    def site(self, name: str) -> Site:
        """Return the site of that name."""
        return next(site for site in self.sites if site.name == name)

    def encoding(self, site: Site, side: Side) -> Encoding:
        """Return how one side of a site is stored."""
        scale = self.column_scales.get(f"{site.name}/{side}")
        column_scale = None if scale is None else np.asarray(scale, np.float32)
        return Encoding(f"sites/{site.name}/{side}", site.dtype, site.width(side), column_scale)

    def encodings(self) -> dict[str, Encoding]:
        """Return the encodings by key ``site/side``."""
        return {f"{site.name}/{side}": self.encoding(site, side) for site in self.sites for side in site.sides}

    def provenance_specs(self) -> tuple[ArraySpec, ...]:
        """Return the one-dimensional arrays that say where each row comes from."""
        return tuple(
            ArraySpec(name, dtype, None, self.shard_rows, self.chunk_rows) for name, dtype in PROVENANCE.items()
        )

    def site_specs(self) -> tuple[ArraySpec, ...]:
        """Return the arrays that hold activations."""
        return tuple(
            spec
            for encoding in self.encodings().values()
            for spec in encoding.specs(self.shard_rows, self.chunk_rows, self.compression)
        )

    def context_specs(self) -> tuple[ArraySpec, ...]:
        """Return the arrays that hold contexts, one row per context."""
        chunk = min(self.block_contexts, CHUNK_CONTEXTS)
        return tuple(
            ArraySpec(f"contexts/{name}", dtype, self.context_length, self.block_contexts, chunk)
            for name, dtype in CONTEXT_ARRAYS.items()
        )

    @model_serializer
    def as_json(self) -> dict[str, JSON]:
        """Return the format as JSON, with keys that this version does not know."""
        return {**vars(self), "sites": [site.as_json() for site in self.sites]}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the format in a text of JSON."""
        return TypeAdapter(cls).validate_json(text)


class SplitRecord(Record):
    """What a manifest says of one split."""

    n_rows: Count
    n_contexts: Count
    """Their rows may not all be stored."""
    bucket_rows: Count
    """Rows that are shuffled together in memory when an epoch is gathered."""
    counts: dict[str, Count]
    """What became of the tokens."""
    unit_records: list[list[str]]
    """For each unit the paths of its commit records; a widened unit has several."""
    block_records: list[str]
    """For each block of contexts the path of its commit record."""
    documents: list[str] = Field(default_factory=list)
    """Files with what the dataset says of every document, where columns are kept."""


class CacheManifest(Manifest):
    """The manifest of one generation of a cache."""

    of_kind = KIND

    format_version: int
    cache_id: str
    """Identity of the cache, from its first request; independent of its path."""
    generation: int
    """0 when first published; one more each time the cache was extended or widened."""
    change: str
    previous: str | None
    """Digest of the generation before."""
    seed: int
    """Of the shuffle inside units, and the default of epochs."""
    model: ModelIdentity
    text: dict[str, JSON]
    packing: dict[str, JSON] = Field(default_factory=dict)
    """How contexts are built."""
    format: CacheFormat
    splits: dict[str, SplitRecord]
    metadata: dict[str, FileRecord]
    """Files that later generations replace."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        """Refuse rows and contexts that no unit and no block vouches for: what reads them would wait for all."""
        for name, split in self.splits.items():
            wanted = -(-split.n_rows // self.format.shard_rows), -(-split.n_contexts // self.format.block_contexts)
            recorded = len(split.unit_records), len(split.block_records)
            if recorded != wanted:
                raise ValueError(f"splits.{name}: wanted the records of {wanted} units and blocks, got {recorded}")
        return self


class ShardsRecord(Record):
    """What vouches for shards: it is written after them."""

    shards: dict[str, FileRecord]
    """By path below their group."""


class CommitRecord(ShardsRecord):
    """What vouches for a part of a split."""

    split: str


class BlockRecord(CommitRecord):
    """The commit record of a block of contexts."""

    block: Count
    n_contexts: Count


class UnitRecord(CommitRecord):
    """The commit record of a unit."""

    unit: Count
    n_rows: Count
    first_context: Count
    """Context of the first row in token order."""
    first_position: Count
    statistics: dict[str, StatisticsRecord]
    """Of each ``site/side``."""


class EpochManifest(Manifest):
    """The manifest of a materialised epoch."""

    of_kind = EPOCH_KIND

    shards: dict[str, FileRecord]


def manifest_name(generation: int) -> str:
    """Return the file name of one generation's manifest."""
    return f"manifest-{generation}.json"


def unit_record_name(generation: int, split: str, unit: int) -> str:
    """Return the path of the commit record of one unit."""
    return f"commits/{generation}/{split}-unit-{unit:06d}.json"


def block_record_name(generation: int, split: str, block: int) -> str:
    """Return the path of the commit record of one block of contexts."""
    return f"commits/{generation}/{split}-contexts-{block:06d}.json"


def seal_path(root: Path, name: str) -> Path:
    """Return the file in an unfinished draft with the checksum of another of its files, as it was written."""
    return root / DRAFT / "seals" / name


def documents_name(generation: int, split: str, number: int) -> str:
    """Return the path of a file with the kept columns of documents that a generation was the first to read."""
    return f"documents/{generation}/{split}-{number:06d}.jsonl"


def packing_name(generation: int) -> str:
    """Return the path of the file that says where packing stands after a generation that packed something."""
    return f"packing/{generation}.json"


def split_path(root: Path, split: str) -> Path:
    """Return the group of one split."""
    return root / split


def superseded_path(root: Path, generation: int, split: str) -> Path:
    """Return the group that keeps the short last shards of a generation after a later one replaced them."""
    return root / "superseded" / str(generation) / split


def statistics_path(generation: int, split: str, key: str) -> str:
    """Return the path of the statistics of one ``site/side``."""
    return f"statistics/{generation}/{split}/{key}"


def epoch_path(root: Path, plan: EpochPlan, generation: int) -> Path:
    """Return the directory of one epoch's materialised order."""
    return root / EPOCHS / f"{plan.split}-generation{generation}-seed{plan.seed}-epoch{plan.epoch}"


def epoch_request(identity: dict[str, Any], plan: EpochPlan) -> dict[str, Any]:
    """Return the request of a materialised epoch that serves ``plan``."""
    return {
        "cache": identity,
        "split": plan.split,
        "seed": plan.seed,
        "epoch": plan.epoch,
        "n_rows": plan.n_rows,
        "bucket_rows": plan.bucket_rows,
    }


def pieces(n_rows: int, piece_rows: int) -> list[int]:
    """Return the sizes of consecutive pieces of ``piece_rows`` rows; the last may be short."""
    return [min(piece_rows, n_rows - start) for start in range(0, n_rows, piece_rows)]
