"""What the manifests of the artifacts say that commands make of caches and transcoders. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlencode

from pydantic import Field, model_validator

from tailrace.storage.artifact import JSON, Count, DerivedManifest, Manifest, Record, shaped
from tailrace.storage.cache_format import Site
from tailrace.storage.parsing import shown
from tailrace.storage.tables import TableRecord


class RunRecord(Record):
    """A run of a sweep."""

    name: str
    status: str
    """``finished`` or ``diverged``."""
    path: str
    """Its folder, inside the sweep."""
    digest: str | None
    """Of its transcoder; None if it diverged."""


class _RunRequest(Record):
    settings: dict[str, JSON]


class _SweepRequest(Record):
    runs: dict[str, _RunRequest]


class SweepManifest(DerivedManifest):
    """The manifest of a sweep."""

    of_kind = "sweep"

    request: Annotated[dict[str, JSON], shaped(_SweepRequest)]
    runs: list[RunRecord]

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        if unknown := [run.name for run in self.runs if run.name not in self.request["runs"]]:
            raise ValueError(f"runs: {shown(unknown)} are not in the request")
        return self


class MemberRecord(Record):
    """A transcoder of a set."""

    site: str
    path: str
    """Its folder, inside the set."""
    digest: str


class LayerSetManifest(DerivedManifest):
    """The manifest of a set of transcoders, one for each layer."""

    of_kind = "transcoders"

    transcoders: list[MemberRecord]


class _OutcomeRecord(Record):
    ce: float
    kl: float


class _ScoreRecord(Record):
    name: str
    sites: list[str]
    n_contexts: Count
    n_predictions: Count
    ce_original: float
    spliced: _OutcomeRecord
    zero: _OutcomeRecord
    mean: _OutcomeRecord
    in_place: dict[str, dict[str, JSON]]


class _EvaluationSettings(Record):
    split: str


class _EvaluationRequest(Record):
    settings: _EvaluationSettings


class EvaluationManifest(DerivedManifest):
    """The manifest of an evaluation."""

    of_kind = "evaluation"

    sites: dict[str, Site]
    request: Annotated[dict[str, JSON], shaped(_EvaluationRequest)]
    scores: Annotated[list[Annotated[dict[str, JSON], shaped(_ScoreRecord)]], Field(min_length=1)]
    """As ``SpliceScore`` records them, with ``name``."""
    tables: dict[str, TableRecord]


class _RootRecord(Record):
    text: str
    value: float
    n_terms: Count
    incompleteness: float


class CircuitManifest(DerivedManifest):
    """The manifest of a circuit."""

    of_kind = "circuit"

    root: Annotated[dict[str, JSON], shaped(_RootRecord)]
    """What the circuit explains, as in ``circuit.json``."""


class AnswerRecord(Record):
    """A token that a task's prompts ask for."""

    token_id: Count
    token: str


class TaskManifest(DerivedManifest):
    """The manifest of a task."""

    of_kind = "task"

    answers: list[AnswerRecord]
    tables: dict[str, TableRecord]


class DashboardManifest(DerivedManifest):
    """The manifest of a dashboard."""

    of_kind = "dashboard"

    site: Site
    """Of the first, if it shows several."""
    sites: dict[str, Site] = Field(default_factory=dict)
    """Of a site over several tables, by name."""
    n_features: Count

    def address(self, site: str) -> str | None:
        """Return where in the folder the features of a site are shown; None unless it is there, once."""
        names = [name for name, one in (self.sites or {"": self.site}).items() if one.name == site]
        if len(names) != 1:
            return None
        return f"index.html?{urlencode({'at': names[0]})}" if self.sites else "index.html"


class DrawManifest(Manifest):
    """The manifest of a blind comparison."""

    of_kind = "blind-comparison"

    format: int = 1
    n_items: Count
    commitment: str
    """Digest of the sealed key."""
    inputs: list[dict[str, JSON]] = Field(default_factory=list)
    """The tables compared."""
    versions: dict[str, str] = Field(default_factory=dict)


class ExportManifest(Manifest):
    """The manifest of an export."""

    of_kind = "export"

    format: int = 1
    to: str
    """The other tool's format."""
    notes: list[str]
    """Sentences a user should read."""
    calibration: list[dict[str, JSON]] = Field(default_factory=list)
    """What a threshold per feature costs, as ``Calibration`` records it, with ``site``."""
    versions: dict[str, str] = Field(default_factory=dict)
