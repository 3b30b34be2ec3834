"""Where nodes of a drawn circuit lie, and how strong a value looks: the same every time, whatever the values.

Layers run upwards and tokens to the right. A token's column is as wide as its fullest layer; nodes that share a cell
stand side by side in it, in the order given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from tailrace.analysis.circuits.nodes import Node


class Column(NamedTuple):
    """The column of a token; of nodes without one for None."""

    token: int | None
    start: float
    width: float


class Layout(NamedTuple):
    """Places (x, y) of nodes in units of one node's width and one layer, and the columns of tokens."""

    places: dict[Node, tuple[float, float]]
    columns: list[Column]


def height_of(node: Node) -> float:
    """Return the place along the layers: L before attention of layer L, L + 0.5 at its MLP.

    What lies beside a node is a quarter of a layer before it.
    """
    if node.of is not None:
        return height_of(node.of) - 0.25
    layer = float(node.layer or 0)
    return layer + 0.5 if node.reads_at != "resid_pre" else layer


EMPTY_LAYER = 0.15
"""Height of a layer in which nothing lies, of that of any other."""


def squeezed(heights: Iterable[float]) -> dict[float, float]:
    """Return where each height is drawn, from 0: what spans empty layers is short, so that what matters is large.

    Order is kept, and heights at most one layer apart keep their distance.
    """
    levels = sorted(set(heights))
    drawn = dict.fromkeys(levels[:1], 0.0)
    for below, here in itertools.pairwise(levels):
        gap = here - below
        drawn[here] = drawn[below] + min(gap, 1 + EMPTY_LAYER * (gap - 1))
    return drawn


def place_nodes(nodes: Iterable[Node]) -> Layout:
    """Return places for any number of nodes, one or none included."""
    cells: dict[tuple[int | None, float], list[Node]] = {}
    for node in nodes:
        token = node.token if node.of is None else node.of.token
        cells.setdefault((token, height_of(node)), []).append(node)
    widths: dict[int | None, int] = {}
    for (token, _), members in cells.items():
        widths[token] = max(widths.get(token, 0), len(members))
    columns, start = [], 0.0
    for token in sorted(widths, key=lambda one: -1 if one is None else one):
        columns.append(Column(token, start, float(widths[token])))
        start += widths[token]
    middle = {column.token: column.start + column.width / 2 for column in columns}
    places = {
        node: (middle[token] + place - (len(members) - 1) / 2, height)
        for (token, height), members in cells.items()
        for place, node in enumerate(members)
    }
    return Layout(places, columns)


def strength(value: float, largest: float) -> float:
    """Return a value from −1 to 1 relative to the largest in size; what inhibits is negative, never merely small."""
    return value / largest if largest > 0 else 0.0
