"""Curves of runs as a page that needs nothing else, and as a PNG or SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tailrace.pipeline.shared.pages import N_SERIES, draw_plot, html_page, palette
from tailrace.storage.artifact import make_directory, write_output
from tailrace.storage.errors import SettingsError
from tailrace.training.loop.curves import RunCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png", ".svg")
MOST_POINTS = 400
"""Points of a curve in a page; where more lines were logged, each is the mean of several."""
_FILES = Path(__file__).parent / "page_files"


class Chart(NamedTuple):
    """A chart: which numbers, and what it is called."""

    key: str
    title: str
    about: str
    is_share: bool = False


CHARTS = (
    Chart("loss", "Loss", "of training batches"),
    Chart("fvu", "FVU", "on held-out rows"),
    Chart("l0", "L0", "features active on a held-out row"),
    Chart("dead", "Dead features", "active on no held-out row", is_share=True),
    Chart("lr", "Learning rate", ""),
    Chart("rate", "Rows per second", ""),
)


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which kind of file is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")


def write_picture(path: Path, runs: Sequence[RunCurves]) -> None:
    """Draw the runs into ``path``. Raises SettingsError, or StorageFull."""
    check_output(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind == "html":
        content = page(runs).encode(errors="replace")  # folders may have names that are not UTF-8
    else:
        content, _ = draw_plot(partial(_draw, runs), kind, (11, 7))
    make_directory(path.absolute().parent)
    write_output(path, content)


def page(runs: Sequence[RunCurves], *, is_live: bool = False) -> str:
    """Return the page; where ``is_live``, it asks for ``curves.json`` beside it every five seconds."""
    data = page_data(runs, is_live=is_live)
    rows = [
        f'<tr data-run="{index}"><td><button type="button" aria-pressed="true"><span class="swatch" style="'
        f'border-color:var(--series-{index % N_SERIES})"></span>{html.escape(run["name"])}</button></td>'
        f'<td class="progress">{html.escape(run["progress"])}</td>'
        f'<td class="verdict">{html.escape(run["verdict"])}</td></tr>'
        for index, run in enumerate(data["runs"])
    ]
    charts = [
        f'<figure class="chart" data-key="{chart.key}"><h2>{chart.title} <small>{chart.about}</small></h2>'
        f'<svg role="img" tabindex="0" aria-label="{chart.title} over training rows; arrow keys read the numbers">'
        "</svg></figure>"
        for chart in CHARTS
        if any(run["curves"][chart.key]["y"] for run in data["runs"])
    ]
    return html_page(
        f"Training of {runs[0].name}" if len(runs) == 1 else f"Training of {len(runs)} runs",
        f"<header><h1>{'Training' if len(runs) == 1 else f'Training of {len(runs)} runs'}</h1>\n"
        '<p class="facts">Over training rows. Point at a chart for its numbers; a name hides a run.</p>'
        "</header>\n<main>\n"
        '<table class="runs"><thead><tr><th scope="col">run</th><th scope="col">steps</th><th scope="col">how it went'
        f"</th></tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>\n"
        f'<div class="charts">\n{chr(10).join(charts)}\n</div>\n</main>',
        style=(_FILES / "curves.css").read_text(encoding="utf-8"),
        script=(_FILES / "curves.js").read_text(encoding="utf-8"),
        data=data,
        asks_server=is_live,
    )


def page_data(runs: Sequence[RunCurves], *, is_live: bool = False) -> dict[str, Any]:
    """Return what the page draws, as JSON has it."""
    names = labels([run.name for run in runs])
    return {
        "live": is_live,
        "charts": [{"key": chart.key, "share": chart.is_share} for chart in CHARTS],
        "runs": [
            {
                "name": name,
                "progress": run.progress,
                "verdict": run.verdict if run.state != "unfinished" else f"under way: {run.verdict}",
                "linear_fvu": run.linear_fvu,
                "curves": {chart.key: _thinned(*curve(run, chart.key)) for chart in CHARTS},
            }
            for name, run in zip(names, runs, strict=True)
        ],
    }


def labels(names: Sequence[str]) -> list[str]:
    """Return short names of a sweep's runs: without settings that all share, ``topk k8`` for ``architecture=topk,k=8``.

    Names that are no settings stay.
    """
    parts = [name.split(",") for name in names]
    if not all("=" in part for own in parts for part in own):
        return list(names)
    shared = set.intersection(*map(set, parts)) if len(names) > 1 else set()
    short = [
        " ".join(_label(part) for part in own if part not in shared) or name
        for own, name in zip(parts, names, strict=True)
    ]
    return short if len(set(short)) == len(short) else list(names)


def _label(part: str) -> str:
    name, _, value = part.partition("=")
    return value if name == "architecture" else f"{name}{value}" if name == "k" else f"{name} {value}"


def curve(run: RunCurves, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and values of a chart's curve, where there are values."""
    if key == "rate":
        numbers, name = run.speed, "rows_per_second"
    else:
        # few batches say what is dead, and what a batch lets through is not what is used later
        is_scored = key in ("fvu", "l0", "dead") and len(run.heldout["rows"]) > 0
        numbers, name = run.heldout if is_scored else run.train, {"dead": "dead_fraction"}.get(key, key)
    if key == "fvu" and np.isfinite(numbers["fvu_ordinary"]).any():
        name = "fvu_ordinary"
    known = np.isfinite(numbers[name])
    return numbers["rows"][known], numbers[name][known]


def _thinned(rows: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    per_point = max(1, math.ceil(len(rows) / MOST_POINTS))
    starts = np.arange(0, len(rows), per_point)
    if per_point > 1:
        lengths = np.diff(np.append(starts, len(rows)))
        rows, values = (np.add.reduceat(numbers, starts) / lengths for numbers in (rows, values))
    return {"x": [round(value) for value in rows.tolist()], "y": [float(f"{value:.5g}") for value in values.tolist()]}


def _draw(runs: Sequence[RunCurves], figure: Figure) -> dict[str, str]:
    """Draw all charts into a figure."""
    names = labels([run.name for run in runs])
    grid = figure.subplots(2, 3).flat
    for chart, axes in zip(CHARTS, grid, strict=True):
        for index, (name, run) in enumerate(zip(names, runs, strict=True)):
            rows, values = curve(run, chart.key)
            axes.plot(rows, values, color=palette()[f"series-{index % N_SERIES}"], linewidth=1.3, label=name)
        axes.set_title(f"{chart.title} {chart.about}".strip(), loc="left", fontsize=10)
        low, high = axes.dataLim.intervaly
        if chart.key in ("loss", "fvu") and low > 0 and high / low > 20:
            axes.set_yscale("log")
        elif chart.key not in ("loss", "fvu"):
            axes.set_ylim(bottom=0)
        if chart.key == "fvu":
            for value in {run.linear_fvu for run in runs if run.linear_fvu is not None}:
                axes.axhline(value, color=palette()["muted"], linestyle="--", linewidth=1)
                axes.annotate(
                    "linear map", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
                )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return {}
