"""The picture of ``pipeline pareto``: PNG and SVG by matplotlib, or one HTML page that needs nothing else.

Lines differ in colour, mark and dash, and the colours (Okabe and Ito 2008) can be told apart by the colour-blind.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrace.pipeline.evaluate.pareto import Point, front
from tailrace.pipeline.evaluate.settings import Measure
from tailrace.storage.artifact import make_directory, write_atomically
from tailrace.storage.errors import SettingsError

SUFFIXES = (".png", ".svg", ".html")
TITLES = {"fvu": "held-out FVU (lower is better)", "ce_recovered": "CE recovered (higher is better)"}
WORTHLESS = {"fvu": "an FVU above 1, worse than the mean", "ce_recovered": "less than 0, worse than zero ablation"}
"""What is said of points that are worse than no transcoder."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
WIDE = 4
"""Ratio of the largest to the smallest L0 from which on the axis is logarithmic."""

_STYLE = (
    "body{font-family:sans-serif;margin:2em auto;max-width:60em;padding:0 1em}svg{width:100%;height:auto}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.3em .6em;border-bottom:1px solid #ccc;text-align:left}"
    "td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}"
)


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which of the three kinds of file is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")


def write_plot(path: Path, groups: Mapping[str, Sequence[Point]], measure: Measure) -> None:
    """Draw the groups of ``pareto.lines`` into ``path``. Raises SettingsError, or StorageFull."""
    check_output(path)
    kind = path.suffix.lower().removeprefix(".")
    content = _page(groups, measure) if kind == "html" else _draw(groups, measure, kind)
    make_directory(path.absolute().parent)
    write_atomically(path, content)


def _draw(groups: Mapping[str, Sequence[Point]], measure: Measure, kind: str) -> bytes:
    # The figure is made without pyplot, which would pick a window system and keep state.
    import matplotlib
    from matplotlib.figure import Figure

    # Names in an SVG are drawn from this salt rather than at random, so the same points give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "tailrace", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        drawn, left_out = _worth_drawing(groups, measure)
        for index, (group, points) in enumerate(drawn.items()):
            _draw_group(axes, group, points, measure, index)
        if left_out:
            axes.set_title(f"not drawn: {left_out} with {WORTHLESS[measure]}", loc="left", fontsize=8)
        l0s = [point.l0 for points in drawn.values() for point in points]
        if min(l0s) > 0 and max(l0s) / min(l0s) >= WIDE:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("L0: mean features active on a held-out row")
        axes.set_ylabel(TITLES[measure])
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _worth_drawing(groups: Mapping[str, Sequence[Point]], measure: Measure) -> tuple[dict[str, list[Point]], int]:
    """Return the points that are better than no transcoder, by group, and how many others there are.

    One run that came near diverging, with an FVU of a million, would press all the others onto the axis. If no point is
    better, all are drawn.
    """
    good = {group: [point for point in points if not _is_worthless(point, measure)] for group, points in groups.items()}
    good = {group: points for group, points in good.items() if points}
    if not good:
        return {group: list(points) for group, points in groups.items()}, 0
    return good, sum(map(len, groups.values())) - sum(map(len, good.values()))


def _is_worthless(point: Point, measure: Measure) -> bool:
    value = point.value(measure)
    return value is not None and (value > 1 if measure == "fvu" else value < 0)


def style(index: int) -> tuple[str, str, str]:
    """Return colour, mark and dash of a line; colour and mark together are the same for none of the first 49."""
    colours, marks = len(COLOURS), len(MARKS)
    return COLOURS[index % colours], MARKS[(index + index // colours) % marks], DASHES[index % len(DASHES)]


def _draw_group(axes: Any, group: str, points: Sequence[Point], measure: Measure, index: int) -> None:
    """Draw every point, and the line through those that no other of the group beats."""
    colour, mark, dash = style(index)
    best = front(points, measure)
    axes.plot(
        [point.l0 for point in best],
        [point.value(measure) for point in best],
        color=colour,
        marker=mark,
        linestyle=dash,
        label=group,
    )
    others = [point for point in points if point not in best]
    axes.plot(
        [point.l0 for point in others],
        [point.value(measure) for point in others],
        color=colour,
        marker=mark,
        linestyle="",
        fillstyle="none",
    )
    for point in points:
        axes.annotate(
            point.name,
            (point.l0, point.value(measure)),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=7,
            color=colour,
            parse_math=False,
        )


def _page(groups: Mapping[str, Sequence[Point]], measure: Measure) -> bytes:
    picture = _draw(groups, measure, "svg").decode()
    picture = picture[picture.index("<svg") :]  # without the declaration of an XML file and its external DTD
    title = f"L0 against {TITLES[measure].split(' (')[0]}"
    head, *rows = table(groups, measure)
    cells = [f"<tr>{''.join(_cell(text, column, 'td') for column, text in enumerate(row))}</tr>" for row in rows]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{picture}\n<table><thead><tr>"
        f"{''.join(_cell(text, column, 'th') for column, text in enumerate(head))}</tr></thead><tbody>\n"
        f"{chr(10).join(cells)}\n</tbody></table></body></html>\n"
    ).encode()


def _cell(text: str, column: int, tag: str) -> str:
    kind = ' class="number"' if column >= 2 else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def table(groups: Mapping[str, Sequence[Point]], measure: Measure) -> list[tuple[str, ...]]:
    """Return a heading and a row for every point; a star marks those on their line."""
    rows: list[tuple[str, ...]] = [("architecture", "transcoder", "L0", "FVU", "CE recovered", "d_sae", "front")]
    for group, points in groups.items():
        best = front(points, measure)
        rows += [
            (
                group,
                point.name,
                f"{point.l0:.1f}",
                "–" if point.fvu is None else f"{point.fvu:.4f}",
                "–" if point.ce_recovered is None else f"{point.ce_recovered:.1%}",
                f"{point.d_sae:,}",
                "*" if point in best else "",
            )
            for point in points
        ]
    return rows
