"""Curves of runs, read from what they log, and how training went in a sentence; needs no torch.

A run logs ``metrics.jsonl`` and ``timing.jsonl`` from its first step, so curves of an unfinished run are there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.storage.artifact import MANIFEST, canonical_json, read_json, unreadable, write_atomically
from tailrace.storage.compared import refuse_changed
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.storage.names import by_number, matching
from tailrace.storage.parsing import LONGEST_LOG, parse_json, read_regular
from tailrace.training.architectures.manifest import BASELINES, MARK, METRICS, TIMING

MEASURES = ("loss", "fvu", "fvu_ordinary", "l0", "dead_fraction", "lr")
"""Numbers that are drawn, by their names in ``metrics.jsonl``."""
FLAT = 0.01
"""A loss that changes by less than this share over the last tenth of a run is called flat."""
_LEAST_LINES = 10

Numbers = Mapping[str, np.ndarray]
"""float64 by name, NaN where there is none; ``step`` and ``rows`` are there always."""


@dataclass(frozen=True)
class RunCurves:
    """What a run has logged, and what became of it."""

    name: str
    path: Path
    state: str
    """``finished``, ``unfinished`` or ``diverged``."""
    n_steps: int | None
    """How long it is meant to be; None where that is not known yet."""
    train: Numbers = field(repr=False)
    """Of batches: ``step``, ``rows``, ``loss``, ``fvu``, ``l0``, ``dead_fraction``, ``lr``."""
    heldout: Numbers = field(repr=False)
    """Of held-out rows: ``step``, ``rows``, ``fvu``, ``fvu_ordinary``, ``l0``, ``dead_fraction``."""
    speed: Numbers = field(repr=False)
    """``step``, ``rows`` and ``rows_per_second`` since the line before."""
    linear_fvu: float | None = None
    """Held-out FVU of the linear map that fits the same rows best, on a sample; None where it is not known."""

    @property
    def fvu(self) -> float | None:
        """The last held-out FVU, of rows that may be learnt from where they are scored apart; None without any."""
        return _last(self.heldout["fvu_ordinary"]) or _last(self.heldout["fvu"])

    @property
    def verdict(self) -> str:
        """How training went, in a line: the course of the loss, dead features, FVU beside the mean and a linear map."""
        if self.state == "diverged":
            return "diverged: the loss or a weight stopped being finite; lower lr or set gradient_clip"
        parts = [trend(self.train["rows"], self.train["loss"])]
        if (dead := _last(self.heldout["dead_fraction"])) is not None:
            parts.append(f"dead features {dead:.1%}")
        if (fvu := self.fvu) is not None:
            linear = "" if self.linear_fvu is None else f", a linear map {self.linear_fvu:.3g}"
            beaten = "mean" if fvu >= 1 else "linear map" if fvu >= (self.linear_fvu or 1) else ""
            worse = f": no better than the {beaten}" if beaten else ""
            parts.append(f"FVU {fvu:.3g} (the mean scores 1{linear}){worse}")
        return "; ".join(parts)

    @property
    def progress(self) -> str:
        """How far it is: steps, and the last loss."""
        if not len(self.train["step"]):
            return "no step logged yet"
        step, loss = int(_last(self.train["step"]) or 0), self.train["loss"][-1]
        share = f" of {self.n_steps:,} steps, {step / self.n_steps:.0%}" if self.n_steps else " steps"
        return f"{step:,}{share}, loss {loss:.4g}"

    def as_json(self) -> dict[str, Any]:
        """Return everything, as JSON has it."""
        about = {"name": self.name, "path": str(self.path), "state": self.state, "n_steps": self.n_steps}
        curves = {"train": self.train, "heldout": self.heldout, "speed": self.speed}
        numbers = {split: {name: _json(values) for name, values in own.items()} for split, own in curves.items()}
        return {**about, "verdict": self.verdict, "linear_fvu": self.linear_fvu, **numbers}


def find_runs(path: Path) -> dict[str, Path]:
    """Return the folders of the runs at ``path`` by name: of itself, a sweep's, or those that lie in it as a folder."""
    if (path / METRICS).exists():
        return {path.name: path}
    folders = sorted(
        {found.parent for pattern in ("*", "*/*") for found in matching(path, f"{pattern}/{METRICS}")},
        key=lambda folder: by_number(folder.as_posix()),
    )
    return {folder.relative_to(path).as_posix().removeprefix("runs/"): folder for folder in folders}


def read_all(paths: Sequence[Path]) -> list[RunCurves]:
    """Return the curves of all runs at ``paths``, named so that no two are alike.

    Raises ArtifactMissing for a path with no run.
    """
    found: list[tuple[Path, str, Path]] = []
    for path in paths:
        runs = find_runs(path.absolute())
        if not runs:
            raise ArtifactMissing(
                f"{path}: holds no run: there is no {METRICS} in it or its folders. Give a transcoder, finished or "
                "not, a sweep, or a folder of either"
            )
        found += [(path, name, folder) for name, folder in runs.items()]
    names = [name for _, name, _ in found]
    clear = [name if names.count(name) == 1 else f"{path}/{name}" for path, name, _ in found]
    return [read_run(folder, name) for name, (_, _, folder) in zip(clear, found, strict=True)]


def read_run(path: Path, name: str | None = None) -> RunCurves:
    """Return the curves of one run."""
    metrics, timing = _read_lines(path / METRICS, MEASURES), _read_lines(path / TIMING, ("seconds", "n_steps"))
    finished, diverged = (path / MANIFEST).exists(), (path / MARK).exists()
    train, heldout = (_of_split(metrics, split) for split in ("train", "heldout"))
    n_steps = _last(timing["n_steps"])
    baselines = read_json(path / BASELINES) if (path / BASELINES).exists() else {}
    return RunCurves(
        name or path.name,
        path,
        "finished" if finished else "diverged" if diverged else "unfinished",
        None if n_steps is None else int(n_steps),
        train,
        heldout,
        _speed(timing, train),
        baselines.get("linear_fvu"),
    )


def trend(rows: np.ndarray, loss: np.ndarray) -> str:
    """Return how the loss moved over the last tenth of the rows, against the tenth before."""
    known = np.isfinite(loss)
    rows, loss = rows[known], loss[known]
    if len(loss) < _LEAST_LINES:
        return "too few lines logged to see whether the loss still falls"
    end = rows[-1]
    before, last = loss[(rows > 0.8 * end) & (rows <= 0.9 * end)], loss[rows > 0.9 * end]
    if len(before) < 2 or len(last) < 2:
        before, last = loss[-6:-3], loss[-3:]
    if last.mean() > 2 * loss.min() and last.mean() > before.mean():
        return f"loss diverges: {last.mean() / loss.min():.1f} times its lowest"
    fall = 1 - last.mean() / before.mean()
    noise = math.sqrt(before.var(ddof=1) / len(before) + last.var(ddof=1) / len(last)) / abs(before.mean())
    if abs(fall) < max(FLAT, 2 * noise):
        return "loss flat over the last tenth"
    return f"loss still falling, by {fall:.1%} over the last tenth" if fall > 0 else f"loss rising, by {-fall:.1%}"


def _speed(timing: Numbers, train: Numbers) -> Numbers:
    """Return rows per second between lines; the clock begins anew where a run was continued."""
    rows_of = dict(zip(train["step"], train["rows"], strict=True))
    rows = np.array([rows_of.get(step, math.nan) for step in timing["step"]])
    n_rows, seconds = (np.diff(values, prepend=0.0) for values in (rows, timing["seconds"]))
    good = (seconds > 0) & (n_rows > 0)
    return {"step": timing["step"][good], "rows": rows[good], "rows_per_second": n_rows[good] / seconds[good]}


def _read_lines(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return numbers by name, and ``split``, of the lines that are all there.

    A line that is being written at this moment is left out, and what a power cut left of lines that were not synced.
    Raises ArtifactCorrupt for anything else that is no line of a log.
    """
    refuse_changed(path)
    content = read_log(path)
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n") and not line.startswith(b"\0")]
    try:  # Arrow's reader ends the process on some lines that are none
        rows = parse_json(b"[" + b",".join(lines) + b"]")
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("wanted an object in each line")
        numbers = {name: _numbers(rows, name) for name in ("step", "rows", *names)}
    except (ValueError, OverflowError) as error:
        raise ArtifactCorrupt(f"{path}: has a line that is none of a log ({error}); restore it") from error
    return {**numbers, "split": np.array([row.get("split") for row in rows], dtype=object)}


def read_log(path: Path) -> bytes:
    """Return what a log holds, nothing if there is none; raise ArtifactCorrupt if it cannot be read or never ends."""
    try:
        return read_regular(path, LONGEST_LOG)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise unreadable(error, path) from error
    except ValueError as error:
        raise ArtifactCorrupt(f"{path}: {error}; restore it") from error


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return a number of each line, NaN where there is none."""
    values = [row.get(name) for row in rows]
    if any(value is not None and type(value) not in (int, float) for value in values):
        raise ValueError(f"{name} is no number")
    return np.array([math.nan if value is None else float(value) for value in values])


def _of_split(lines: Numbers, split: str) -> Numbers:
    chosen = lines["split"] == split
    return {name: values[chosen] for name, values in lines.items() if name != "split"}


def _last(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _json(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def write_baselines(path: Path, linear_fvu: float | None) -> None:
    """Write what a transcoder should beat beside a run; it is no part of the artifact."""
    write_atomically(path / BASELINES, canonical_json({"mean_fvu": 1.0, "linear_fvu": linear_fvu}))
