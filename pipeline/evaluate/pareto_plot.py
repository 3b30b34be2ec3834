"""The picture of ``pipeline pareto``: PNG and SVG, or one HTML page that needs nothing else."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailrace.pipeline.evaluate.pareto import Point, front
from tailrace.pipeline.evaluate.settings import Measure
from tailrace.pipeline.shared.pages import N_SERIES, WIDE, draw_plot, html_page, palette, plot_html
from tailrace.storage.artifact import make_directory, write_output
from tailrace.storage.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

SUFFIXES = (".png", ".svg", ".html")
TITLES = {"fvu": "held-out FVU (lower is better)", "ce_recovered": "CE recovered (higher is better)"}
WORTHLESS = {"fvu": "an FVU above 1, worse than the mean", "ce_recovered": "less than 0, worse than zero ablation"}
"""What is said of points that are worse than no transcoder."""
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
RATIO_OF_LOG = 4
"""Ratio of the largest to the smallest L0 from which on the axis is logarithmic."""
_OFFSETS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (5, 14, 26, 40)
"""Points between a mark and its label; past the second a line joins the two."""


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which of the three kinds of file is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")


def write_plot(path: Path, groups: Mapping[str, Sequence[Point]], measure: Measure) -> None:
    """Draw the groups of ``pareto.lines`` into ``path``. Raises SettingsError, or StorageFull."""
    check_output(path)
    kind = path.suffix.lower().removeprefix(".")
    draw = partial(draw_points, groups, measure)
    content = _page(groups, measure).encode() if kind == "html" else draw_plot(draw, kind)[0]
    make_directory(path.absolute().parent)
    write_output(path, content)


def draw_points(groups: Mapping[str, Sequence[Point]], measure: Measure, figure: Figure) -> dict[str, str]:
    """Draw lines, marks and labels; return what is known of every mark, by its name in the figure."""
    axes = figure.add_subplot()
    drawn, left_out = _worth_drawing(groups, measure)
    points = [point for members in drawn.values() for point in members]
    tips = {f"mark {number}": describe(point) for number, point in enumerate(points)}
    best = front(points, measure)
    if len(drawn) > 1:
        axes.plot(*_coordinates(best, measure), color=palette()["line"], linewidth=9, label="best of all", zorder=1)
    for index, (group, members) in enumerate(drawn.items()):
        _draw_group(axes, group, members, measure, index)
    if left_out:
        axes.set_title(f"not drawn: {left_out} with {WORTHLESS[measure]}", loc="left", fontsize=9)
    l0s = [point.l0 for point in points]
    if min(l0s) > 0 and max(l0s) / min(l0s) >= RATIO_OF_LOG:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(0.08)
    axes.set_xlabel("L0: mean features active on a held-out row")
    axes.set_ylabel(TITLES[measure])
    figure.legend(loc="outside upper left", ncols=4 if figure.get_figwidth() == WIDE[0] else 2)
    for name, (x, y) in zip(tips, zip(*_coordinates(points, measure), strict=True), strict=True):
        # a mark is small: this answers the pointer, and is seen only then
        axes.plot([x], [y], marker="o", markersize=16, color=palette()["page"], alpha=0, zorder=9)[0].set_gid(name)
    figure.draw_without_rendering()  # fixes the layout, which labels then leave alone
    _label(axes, best, [point for point in points if point not in best], drawn, measure)
    return tips


def describe(point: Point) -> str:
    """Return a transcoder's numbers in a few lines."""
    numbers = [f"L0 {point.l0:.4g}"]
    numbers += [] if point.fvu is None else [f"FVU {point.fvu:.4g}"]
    numbers += [] if point.ce_recovered is None else [f"CE recovered {point.ce_recovered:.1%}"]
    return f"{point.name}\n{point.group}, {point.d_sae:,} features\n{', '.join(numbers)}"


def short_label(point: Point) -> str:
    """Return the settings that were swept without the architecture, which the legend names."""
    return ",".join(part for part in point.name.split(",") if not part.startswith("architecture="))


def _coordinates(points: Sequence[Point], measure: Measure) -> tuple[list[float], list[Any]]:
    return [point.l0 for point in points], [point.value(measure) for point in points]


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
    mark = MARKS[(index + index // N_SERIES) % len(MARKS)]
    return palette()[f"series-{index % N_SERIES}"], mark, DASHES[index % len(DASHES)]


def _draw_group(axes: Axes, group: str, points: Sequence[Point], measure: Measure, index: int) -> None:
    """Draw every point, and the line through those that no other of the group beats."""
    colour, mark, dash = style(index)
    best = front(points, measure)
    others = [point for point in points if point not in best]
    axes.plot(*_coordinates(best, measure), color=colour, marker=mark, linestyle=dash, label=group)
    axes.plot(*_coordinates(others, measure), color=colour, marker=mark, linestyle="", fillstyle="none")


def _label(
    axes: Axes,
    best: Sequence[Point],
    others: Sequence[Point],
    groups: Mapping[str, Sequence[Point]],
    measure: Measure,
) -> None:
    """Write each point's settings where they cover no label and no mark, cross no line if that can be, and stay inside.

    The figure has been drawn once. Those that fit nowhere are left out, the best last: their numbers are in the table.
    """
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    scale = axes.figure.dpi / 72

    def pixels(points: Sequence[Point]) -> list[tuple[float, float]]:
        places = zip(*_coordinates(points, measure), strict=True)
        return [tuple(axes.transData.transform(place)) for place in places]

    everyone = [*best, *others]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in pixels(everyone)]
    lines = [pair for members in groups.values() for pair in itertools.pairwise(pixels(front(members, measure)))]
    for point, (x, y) in zip(everyone, pixels(everyone), strict=True):
        label = axes.annotate(
            short_label(point), (point.l0, point.value(measure) or 0), fontsize=8, textcoords="offset points",
            parse_math=False, zorder=5, xytext=(0, 0), verticalalignment="bottom",
        )  # fmt: skip
        label.set_in_layout(False)
        size = label.get_window_extent()
        # best points lie below all others where less is better, and are labelled on that side
        side = -1 if (point in best) == (measure == "fvu") else 1
        candidates = list(_around(x, y, size.width, size.height, scale, side))
        free = [
            candidate
            for candidate in candidates
            if _is_inside(candidate[1], frame) and not any(candidate[1].overlaps(other) for other in taken)
        ]
        clear = [candidate for candidate in free if not any(_crosses(candidate[1], line) for line in lines)]
        if not free:
            label.remove()
            continue
        distance, box = (clear or free)[0]
        taken.append(box)
        label.set_position(((box.x0 - x) / scale, (box.y0 - y) / scale))
        if distance > _DISTANCES[1]:
            middle = ((box.x0 + box.x1) / 2, min(max(y, box.y0), box.y1))
            ends = axes.transData.inverted().transform([(x, y), middle])
            axes.plot(
                *zip(*ends, strict=True), color=palette()["muted"], linewidth=0.5, zorder=2, scalex=False, scaley=False
            )


def _around(x: float, y: float, width: float, height: float, scale: float, side: int) -> Iterator[tuple[float, Bbox]]:
    """Yield boxes for a label about a mark: the nearest first, of these those above for ``side`` 1, below for -1."""
    from matplotlib.transforms import Bbox

    for distance in _DISTANCES:
        for right, up in sorted(_OFFSETS, key=lambda offset: -side * offset[1]):
            step = distance * scale * (1 if 0 in (right, up) else 0.8)
            left = x + right * step - (width if right < 0 else width / 2 if right == 0 else 0)
            low = y + up * step - (height if up < 0 else height / 2 if up == 0 else 0)
            yield distance, Bbox.from_bounds(left, low, width, height)


def _is_inside(box: Bbox, frame: Bbox) -> bool:
    return bool(box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1)


def _crosses(box: Bbox, line: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    from matplotlib.path import Path as Outline

    return bool(Outline(line).intersects_bbox(box, filled=False))


def _page(groups: Mapping[str, Sequence[Point]], measure: Measure) -> str:
    title = f"L0 against {TITLES[measure].split(' (')[0]}"
    head, *rows = table(groups, measure)
    cells = [f"<tr>{''.join(_cell(text, column, 'td') for column, text in enumerate(row))}</tr>" for row in rows]
    return html_page(
        title,
        f'<header><h1>{html.escape(title)}</h1><p class="facts">{len(rows):,} transcoders. Filled marks are those that '
        "no other of their architecture beats; point at a mark for its numbers.</p></header>\n<main>\n"
        f"{plot_html(partial(draw_points, groups, measure), title)}"
        '<h2 id="numbers">Numbers</h2>\n'
        '<div class="scroll-x" role="region" aria-labelledby="numbers" tabindex="0">'
        f"<table><thead><tr>{''.join(_cell(text, column, 'th') for column, text in enumerate(head))}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(cells)}\n</tbody></table></div>\n</main>",
        style="td { white-space: nowrap; }\n"
        ".plot [data-tip] use { pointer-events: all; }\n"
        ".plot [data-tip]:is(:hover, :focus-visible) use { opacity: 1 !important; fill: none !important; "
        "stroke: var(--ink) !important; stroke-width: 1.5 !important; }\n",
    )


def _cell(text: str, column: int, tag: str) -> str:
    kind = ' class="number"' if 2 <= column <= 5 else ""
    scope = ' scope="col"' if tag == "th" else ""
    return f"<{tag}{scope}{kind}>{html.escape(text)}</{tag}>"


def table(groups: Mapping[str, Sequence[Point]], measure: Measure) -> list[tuple[str, ...]]:
    """Return a heading and a row for every point; ``front`` says what no other beats: of all, or of its line."""
    rows: list[tuple[str, ...]] = [("architecture", "transcoder", "L0", "FVU", "CE recovered", "d_sae", "front")]
    overall = front([point for points in groups.values() for point in points], measure)
    for group, points in groups.items():
        best = front(points, measure)
        rows += [
            (
                group,
                short_label(point) or point.name,
                f"{point.l0:.1f}",
                "–" if point.fvu is None else f"{point.fvu:.4f}",
                "–" if point.ce_recovered is None else f"{point.ce_recovered:.1%}",
                f"{point.d_sae:,}",
                "of all" if point in overall else "of its line" if point in best else "",
            )
            for point in points
        ]
    return rows
