"""``runs.parquet``: one row for each run of a sweep, with its settings and how it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic.fields import FieldInfo

from tailrace.analysis.evaluate.recovered import recorded_share
from tailrace.pipeline.shared.options import flat_values, setting_fields
from tailrace.storage.tables import column, write_table
from tailrace.training.loop.settings import TrainSettings

RUNS_TABLE = "runs.parquet"
FINISHED = "finished"
DIVERGED = "diverged"


@dataclass(frozen=True)
class RunOutcome:
    """How one run of a sweep ended."""

    name: str
    status: str
    """``finished`` or ``diverged``."""
    path: str
    """Its folder, inside the sweep."""
    settings: dict[str, Any] = field(repr=False)
    """All of them, as recorded."""
    metrics: dict[str, Any] = field(repr=False)
    """``steps``, ``rows``, the last ``train`` losses, and the ``heldout`` and ``model`` scores if there are any."""

    def row(self) -> dict[str, Any]:
        """Return the run's row of ``runs.parquet`` by column; a setting of another kind's is left out."""
        heldout, model = self.metrics.get("heldout", {}), self.metrics.get("model", {})
        finished = self.status == FINISHED
        return {
            "name": self.name,
            "status": self.status,
            "path": self.path,
            "n_steps": self.metrics["steps"],
            "n_rows": self.metrics["rows"],
            # an earlier score of a run that diverged is no result
            **{name: heldout.get(name.removeprefix("heldout_")) if finished else None for name in _HELDOUT},
            "ce_recovered": recorded_share(model) if finished else None,
            **{f"train_{name}": value for name, value in self.metrics.get("train", {}).items()},
            **flat_values(TrainSettings, self.settings),
        }


_HELDOUT = ("heldout_fvu", "heldout_l0", "heldout_dead_fraction")

_FIXED = (
    column("name", pa.string(), "the run's name: the settings that were swept, with their values"),
    column("status", pa.string(), "finished, or diverged if its loss or weights stopped being finite"),
    column("path", pa.string(), "folder of the run inside the sweep"),
    column("n_steps", pa.int64(), "optimiser steps done", unit="steps"),
    column("n_rows", pa.int64(), "training rows seen, repeats counted", unit="rows"),
    column("heldout_fvu", pa.float64(), "share of the held-out outputs' variance left unexplained", nullable=True),
    column("heldout_l0", pa.float64(), "mean number of features on a held-out row", unit="features", nullable=True),
    column("heldout_dead_fraction", pa.float64(), "share of features active on no held-out row", nullable=True),
    column("ce_recovered", pa.float64(), "share of zero ablation's loss recovered, if measured", nullable=True),
)  # fmt: skip
_TRAINING = {
    "loss": "the whole training loss in the last line logged",
    "reconstruction": "its reconstruction term",
    "l0": "mean number of features active on a row of that batch",
    "dead_fraction": "share of features that had not fired for dead_after_steps steps",
    "lr": "learning rate of that step",
}


def write_runs(path: Path, outcomes: Sequence[RunOutcome]) -> None:
    """Write one row for every outcome; raises StorageFull if the disk refuses."""
    rows = [outcome.row() for outcome in outcomes]
    schema = runs_schema(rows)
    columns = [pa.array([_cell(row.get(field.name), field.type) for row in rows], field.type) for field in schema]
    write_table(path, schema, [pa.RecordBatch.from_arrays(columns, schema=schema)])


def runs_schema(rows: Sequence[dict[str, Any]]) -> pa.Schema:
    """Return the columns that ``rows`` need: outcomes, training losses, then every setting."""
    known = setting_fields(TrainSettings)
    names = dict.fromkeys(name for row in rows for name in row)
    fixed = {field.name for field in _FIXED}
    losses = sorted(name for name in names if name.startswith("train_") and name not in known)
    settings = [name for name in known if name in names and name not in fixed]
    return pa.schema(
        [
            *_FIXED,
            *(column(name, pa.float64(), _training_meaning(name), nullable=True) for name in losses),
            *(_setting_column(name, known[name]) for name in settings),
        ]
    )


def _training_meaning(name: str) -> str:
    term = name.removeprefix("train_")
    return _TRAINING.get(term, f"{term.replace('_', ' ')} in the last line of training losses logged")


def _setting_column(name: str, field: FieldInfo) -> pa.Field:
    meaning = "setting: " + " ".join((field.description or "").split()).rstrip(".")
    return column(name, _arrow_type(field.annotation), meaning, nullable=True)


def _arrow_type(annotation: Any) -> pa.DataType:
    """Return the column type of a setting; anything that is not a plain number, truth value or text is kept as JSON."""
    if get_origin(annotation) is Annotated:
        return _arrow_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _arrow_type(options[0]) if len(options) == 1 else pa.string()
    if get_origin(annotation) is Literal:
        return pa.string()
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(annotation, pa.string())


def _cell(value: Any, kind: pa.DataType) -> Any:
    return json.dumps(value) if pa.types.is_string(kind) and not isinstance(value, str | None) else value
