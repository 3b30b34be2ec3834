"""``layers.parquet`` of a set of transcoders: how good each layer's is on held-out rows, and which layers to distrust.

Some layers of most language models write vectors of a hundred times the usual length on a few tokens. Squared error
and variance are then those tokens' alone, so FVU says how well they are fitted and nothing of all the others; it is
therefore also taken over the ordinary rows, and such layers are marked with what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.layout import Side
from tailrace.storage.statistics import MASSIVE_SHARE, SiteStatistics
from tailrace.storage.tables import column, read_table, write_table
from tailrace.training.architectures.transcoder import Transcoder
from tailrace.training.loop.evaluate import evaluate, predictor
from tailrace.training.rows.batches import iter_once
from tailrace.training.rows.ordinary_rows import OrdinaryRows

LAYERS = "layers.parquet"
ORDINARY_NORMS = 10.0
"""A row is ordinary if neither its input nor its output is longer than this many times the median."""

LAYERS_SCHEMA = pa.schema(
    [
        column("layer", pa.int32(), "layer of the language model"),
        column("site", pa.string(), "site of the cache that the transcoder replaces"),
        column("path", pa.string(), "folder of the transcoder, beside this table"),
        column("status", pa.string(), "finished, or diverged if its loss or weights stopped being finite"),
        column("n_rows", pa.int64(), "held-out rows it is scored on", unit="rows"),
        column("fvu", pa.float64(), "share of the held-out outputs' variance left unexplained", nullable=True),
        column("l0", pa.float64(), "mean number of features on a held-out row", unit="features", nullable=True),
        column("dead_fraction", pa.float64(), "share of features active on no held-out row", nullable=True),
        column(
            "fvu_ordinary",
            pa.float64(),
            f"FVU over the held-out rows whose input and output are at most {ORDINARY_NORMS:.0f} median norms long",
            nullable=True,
        ),
        column("n_ordinary", pa.int64(), "these rows", unit="rows"),
        column("energy_share_in", pa.float64(), "share of Σ‖input‖² held by the longest 1 % of training rows"),
        column("energy_share_out", pa.float64(), "share of Σ‖output‖² held by the longest 1 % of training rows"),
        column("median_norm_in", pa.float64(), "median input norm of training rows, within 9 %", unit="input"),
        column("median_norm_out", pa.float64(), "median output norm of training rows, within 9 %", unit="output"),
        column("largest_norm_in", pa.float64(), "largest input norm of training rows, within 9 %", unit="input"),
        column("largest_norm_out", pa.float64(), "largest output norm of training rows, within 9 %", unit="output"),
        column("is_massive", pa.bool_(), f"whether either energy share is above {MASSIVE_SHARE:g}"),
        column("note", pa.string(), "why not to trust the FVU; null if nothing speaks against it", nullable=True),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class LayerOutcome:
    """One layer's row of the table; every field is described by its column."""

    layer: int
    site: str
    path: str
    status: str
    n_rows: int
    fvu: float | None
    l0: float | None
    dead_fraction: float | None
    fvu_ordinary: float | None
    n_ordinary: int
    energy_share_in: float
    energy_share_out: float
    median_norm_in: float
    median_norm_out: float
    largest_norm_in: float
    largest_norm_out: float
    is_massive: bool
    note: str | None

    @property
    def is_finished(self) -> bool:
        """Whether there is a transcoder."""
        return self.status == "finished"


def massive_note(sides: Mapping[str, SiteStatistics]) -> str | None:
    """Return what is wrong with a layer a few rows of which dwarf all others, by side; None for other layers."""
    notes = [f"{side}s: {note}" for side, statistics in sides.items() if (note := statistics.massive_note())]
    return "massive activations; " + "; ".join(notes) if notes else None


def score_layer(
    cached: ActivationCache,
    site: str,
    layer: int,
    coder: Transcoder | None,
    diverged: Mapping[str, Any] | None,
    *,
    device: torch.device,
    batch_rows: int = 4096,
) -> LayerOutcome:
    """Score one layer's transcoder, None if it ``diverged``, on all held-out rows of ``cached``."""
    train = cached.split("train")
    sides: dict[Side, SiteStatistics] = {"in": train.statistics(site, "in"), "out": train.statistics(site, "out")}
    massive = massive_note({"input": sides["in"], "output": sides["out"]})
    notes = [note for note in (massive, None if diverged is None else f"diverged: {diverged['reason']}") if note]
    score = None
    if coder is not None and "heldout" in cached.manifest.splits:
        split = cached.split("heldout")

        batches = iter_once(split, cached.sites[site], batch_rows=batch_rows, device=device)
        score = evaluate(predictor(coder), batches, OrdinaryRows.within(ORDINARY_NORMS, sides))
    return LayerOutcome(
        layer=layer,
        site=site,
        path=site,
        status="finished" if coder is not None else "diverged",
        n_rows=0 if score is None else score.n_rows,
        fvu=None if score is None else score.fvu,
        l0=None if score is None else score.l0,
        dead_fraction=None if score is None else score.dead_fraction,
        fvu_ordinary=None if score is None or score.ordinary is None else score.ordinary.fvu,
        n_ordinary=0 if score is None or score.ordinary is None else score.ordinary.n_rows,
        energy_share_in=sides["in"].energy_share(),
        energy_share_out=sides["out"].energy_share(),
        median_norm_in=sides["in"].median_norm,
        median_norm_out=sides["out"].median_norm,
        largest_norm_in=sides["in"].largest_norm,
        largest_norm_out=sides["out"].largest_norm,
        is_massive=massive is not None,
        note="; ".join(notes) or None,
    )


def write_layers(path: Path, outcomes: Sequence[LayerOutcome]) -> None:
    """Write a row per layer; raises StorageFull if the disk refuses."""
    rows = [asdict(outcome) for outcome in outcomes]
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in LAYERS_SCHEMA]
    write_table(path, LAYERS_SCHEMA, [pa.RecordBatch.from_arrays(columns, schema=LAYERS_SCHEMA)])


def read_layers(path: Path) -> list[LayerOutcome]:
    """Return the rows of the table."""
    return [LayerOutcome(**row) for row in read_table(path).to_pylist()]
