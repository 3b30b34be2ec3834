"""What a published transcoder says of itself, of one layer or several, and the names of its files; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tailrace.storage.artifact import JSON, Count, DerivedManifest, Record, published_kind, shaped
from tailrace.storage.cache_format import Site, Size
from tailrace.storage.formats import ARTIFACT_FORMATS, CROSS_LAYER_KIND, FOR_ONE_LAYER_ONLY
from tailrace.training.architectures.settings import AnyArchitecture

KIND = "transcoder"
"""The artifact's kind."""
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
WEIGHTS = "weights.safetensors"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
BASELINES = "baselines.json"
"""Held-out FVU of simpler maps of the same rows; like times, no part of the artifact."""
MARK = "diverged.json"
"""In the folder of a run that diverged: step, rows, scores and the reason."""
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"

Scores = dict[str, JSON]
"""Numbers by the names that ``metrics.jsonl`` has for them."""


class _HeldoutScores(Record):
    fvu: float | None
    fvu_ordinary: float | None = None
    l0: float
    dead_fraction: float
    n_rows: Count


class _LayerScores(_HeldoutScores):
    site: str


LayerScores = Annotated[Scores, shaped(_LayerScores)]
"""The score of one layer, with its ``site``."""


class Metrics(Record):
    """How long a transcoder was trained, and its last numbers."""

    steps: Count = 0
    rows: Count = 0
    train: Scores = Field(default_factory=dict)
    heldout: Annotated[Scores, shaped(_HeldoutScores, or_empty=True)] = Field(default_factory=dict)
    """Over all held-out rows; empty without any."""
    best: Scores = Field(default_factory=dict)
    model: Scores = Field(default_factory=dict)
    """What the language model loses by it, if that was measured."""


class Limits(Record):
    """The longest vectors among the rows that a layer was trained on."""

    longest_in: float
    longest_out: float


class Origin(Record):
    """The tool that a transcoder was imported from."""

    format: str
    model_name: str | None = None
    facts: dict[str, JSON] = Field(default_factory=dict)
    firing: JSON = None


class ImportScores(Record):
    """How good an import is on rows of a cache."""

    split: str
    n_rows: int | None = None
    fvu: float | None = None
    """None if the outputs do not vary."""
    l0: float | None = None
    layers: list[LayerScores] = Field(default_factory=list)
    """Of a cross-layer transcoder, in place of the numbers above."""


class _TranscoderManifest(DerivedManifest):
    """What both kinds of transcoders say."""

    d_sae: Size
    """Features that read a layer."""
    architecture: AnyArchitecture
    normalisation: dict[str, JSON] = Field(default_factory=dict)
    packing: dict[str, JSON] = Field(default_factory=dict)
    """How the contexts and rows of the cache it was trained on were made; empty where that is not recorded."""
    precision: str | None = None
    metrics: Metrics
    origin: Origin | None = None
    """None for a transcoder that was trained here."""
    measured: ImportScores | None = None
    notes: list[str] = Field(default_factory=list)
    """Sentences on an import that a user should read."""


class TranscoderManifest(_TranscoderManifest):
    """The manifest of a transcoder of one layer."""

    of_kind = KIND
    instead = FOR_ONE_LAYER_ONLY

    site: Site
    learnt_from: Limits | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its one site."""
        return (self.site,)


class CrossLayerManifest(_TranscoderManifest):
    """The manifest of one transcoder over several layers."""

    of_kind = CROSS_LAYER_KIND

    sites: tuple[Site, ...]
    """Lowest layer first."""
    layers: list[LayerScores]
    """The score of each layer's output on held-out rows, with ``site``; empty without any."""
    learnt_from: dict[str, Limits] | None = None
    """By site."""


AnyTranscoderManifest = TranscoderManifest | CrossLayerManifest


def is_cross_layer(path: Path) -> bool:
    """Return whether a published cross-layer transcoder lies at ``path``."""
    return published_kind(path) == CROSS_LAYER_KIND


def read_either_manifest(path: Path) -> AnyTranscoderManifest:
    """Return the manifest of a transcoder of either kind; the errors are those of ``Manifest.read``."""
    return (CrossLayerManifest if is_cross_layer(path) else TranscoderManifest).read(path)
