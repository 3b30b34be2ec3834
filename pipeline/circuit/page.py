"""A circuit as one HTML file that opens from disk: graphs to pan and zoom, a card for every feature, the paths as text.

The data lies in the file as JSON, and the script writes it into the page as text, so nothing of a prompt or a token can
become markup or code.

In the picture layers run upwards and tokens to the right. A token's column is as wide as its fullest layer; nodes that
share a cell stand side by side in it, in the order given: the same every time, whatever the values.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from tailrace.analysis.circuits.documents import read_node
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.paths import show_value
from tailrace.analysis.dashboards.values import visible_token
from tailrace.pipeline.circuit.words import KINDS, Words, quoted
from tailrace.pipeline.shared.pages import html_page

JSON = dict[str, Any]
_FILES = files("tailrace.pipeline.circuit") / "page_files"
_OUTPUT = re.compile(r'Output "(.*)" \(p=.*\)', re.DOTALL)
"""What the viewers call a token that may come next; at a node there is room for the token alone."""

_EMPTY_LAYER = 0.15
"""Height of a layer in which nothing lies, of that of any other."""
_LIKELY = 0.005
"""Probability from which a token is said to be likely."""
_N_FIRES = 3
"""Tokens of the prompt in a feature's label."""
_LABEL = 40
"""Characters at a node of what people call its feature."""


def render_page(document: JSON, cards: Mapping[tuple[int, int], JSON], pages: Mapping[int, str] = {}) -> str:
    """Return the page of a ``circuit.json``.

    ``cards`` say what tables know of features, by layer and index; ``pages`` where a dashboard shows those of a layer.
    """
    words = Words(document)
    features = _features(document, cards)
    graphs = [graph for graph in _graphs(document, words, features) if graph["nodes"]]
    tokens = [visible_token(token["text"]) for token in document["tokens"]]
    data = {
        "prompt": document["prompt"],
        "tokens": tokens,
        "here": document["root"]["node"]["token"],
        "rounds": [[_path(path, words, graphs) for path in paths] for paths in document["rounds"]],
        "graphs": [{name: value for name, value in graph.items() if name != "places"} for graph in graphs],
        "cards": {
            f"{layer}:{index}": card | ({"page": f"{pages[layer]}#feature={index}"} if layer in pages else {})
            for (layer, index), card in features.items()
        },
    }
    part = {name: (_FILES / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    body = part["html"].replace("<!--HEADER-->", _header(document, words, tokens))
    return html_page(words.question(), body, style=part["css"], script=part["js"], data=data)


def _header(document: JSON, words: Words, tokens: Sequence[str]) -> str:
    """Return the question, the prompt, what is likely to come next, and what the root is made of."""
    root = document["root"]
    shown = "".join(
        f'<span class="token{" here" if place == root["node"]["token"] else ""}" data-tip="token {place}">'
        f"{html.escape(text)}</span>"
        for place, text in enumerate(tokens)
    )
    likely = ", ".join(
        f"{quoted(one['text'])} {one['probability']:.0%}"
        for one in document.get("likely", [])
        if one["probability"] >= _LIKELY
    )
    inactive = "" if root["is_active"] else "The feature is not active here: its pre-activation is explained. "
    return (
        f'<h1>{html.escape(words.question())}</h1>\n<p id="prompt">{shown}</p>\n'
        f'<p class="facts">{f"Likely to come next: {html.escape(likely)}. " if likely else ""}'
        f"{inactive}{html.escape(words.root())} is {show_value(root['value'])}, the sum of {root['n_terms']:,} terms "
        f"(exact within {root['incompleteness']:.0e} of the sum of their sizes):</p>\n{_sums(root)}"
    )


def _sums(root: JSON) -> str:
    """Return a bar of what kinds of terms add to the root, and the numbers; hatched is what they take away."""
    sums = sorted(root["by_kind"].items(), key=lambda pair: -pair[1])
    bar = "".join(
        f'<span class="sum {kind}{" less" if value < 0 else ""}" style="flex-grow: {abs(value):.4g}"></span>'
        for kind, value in sums
    )
    bos = f" ({show_value(root['from_bos'])} from the BOS)" if root.get("from_bos") else ""
    listed = "".join(
        f'<li><span class="sum {kind}{" less" if value < 0 else ""}"></span>{html.escape(KINDS[Kind(kind)])} '
        f"{show_value(value)}{bos if kind == Kind.HEAD else ''}</li>"
        for kind, value in sums
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div>\n<ul class="sums">{listed}</ul>'


def _features(document: JSON, cards: Mapping[tuple[int, int], JSON]) -> dict[tuple[int, int], JSON]:
    """Return of every feature shown its label, where it fires on this prompt, and its card if there are tables."""
    texts = [token["text"] for token in document["tokens"]]
    found = {}
    for feature in document["features"]:
        key = feature["layer"], feature["index"]
        card = cards.get(key, {})
        fires = [(visible_token(texts[one["token"]]), one["activation"]) for one in feature["fires_on"]]
        here = list(dict.fromkeys(text.strip() or text for text, _ in fires))[:_N_FIRES]
        if not here and card.get("top_token") is not None:  # a feature that does not fire can be explained, too
            here = [visible_token(card["top_token"])]
        if card.get("label"):
            here = [textwrap.shorten(card["label"], _LABEL, placeholder="…")]
        on_prompt = ", ".join(f"'{text}' {show_value(value)}" for text, value in fires) or "no token"
        found[key] = {
            "label": " ".join([f"#{feature['index']}", " · ".join(here)]).strip(),
            "is_rare": card.get("is_rare", False) and not card.get("label"),
            "facts": [("fires here on", on_prompt), *card.get("facts", [])],
            "examples": card.get("examples", []),
        }
    return found


def features_shown(document: JSON) -> set[tuple[int, int]]:
    """Return layer and index of every feature that some graph or path of a circuit shows."""
    described = [
        node for name in ("path_graph", "attribution_graph") for node in (document[name] or {"nodes": []})["nodes"]
    ]
    described += [step["node"] for paths in document["rounds"] for path in paths for step in path["steps"]]
    kinds = (Kind.FEATURE.value, Kind.DECODER.value)
    return {(node["layer"], node["index"]) for node in [*described, document["root"]["node"]] if node["kind"] in kinds}


def _graphs(document: JSON, words: Words, features: Mapping[tuple[int, int], JSON]) -> list[JSON]:
    names = {"path_graph": "Paths", "attribution_graph": "Attribution graph"}
    return [
        _drawn(title, document[name], words, features) for name, title in names.items() if document[name] is not None
    ]


def _path(path: JSON, words: Words, graphs: Sequence[JSON]) -> JSON:
    """Return a path in words, and which nodes of each graph are on it."""
    nodes = [read_node(step["node"]) for step in path["steps"]]
    places = [[graph["places"][node] for node in nodes if node in graph["places"]] for graph in graphs]
    return {"steps": words.path(path["steps"]), "nodes": places}


def _label(node: Node, described: JSON, features: Mapping[tuple[int, int], JSON]) -> str:
    """Return what is written at a node: row and column say its layer and token, so neither is repeated."""
    match node.kind:
        case Kind.FEATURE | Kind.DECODER:
            return str(features[node.layer or 0, node.index or 0]["label"])
        case Kind.HEAD:
            return f"h{node.index}"
        case Kind.LOGIT:
            return visible_token(_OUTPUT.sub(r"\1", str(described.get("text", ""))))
    return ""


def _size(described: JSON) -> float:
    """Return how large a node is drawn; the targets of an attribution graph, which have no influence, as if all."""
    influence = described.get("influence", described["value"])
    return 1.0 if influence is None else float(influence)


def _drawn(title: str, graph: JSON, words: Words, features: Mapping[tuple[int, int], JSON]) -> JSON:
    nodes = [read_node(described) for described in graph["nodes"]]
    layout = place_nodes(nodes)
    heights = {math.floor(height_of(node)) for node in nodes}
    layers = sorted(height for height in heights if height >= 0)  # what lies beside a token lies below the first
    outputs = {node.layer for node in nodes if node.kind in (Kind.LOGIT, Kind.LOGIT_DIFFERENCE)}
    levels = squeezed([*(y for _, y in layout.places.values()), *layers])
    largest_edge = max((abs(edge["value"]) for edge in graph["edges"]), default=0.0)
    # Of a graph of paths all values are contributions to the root; of an attribution graph, influence is what compares.
    sizes = [_size(described) for described in graph["nodes"]]
    largest = max((abs(size) for size in sizes), default=0.0)
    drawn = []
    for node, described, size in zip(nodes, graph["nodes"], sizes, strict=True):
        x, y = layout.places[node]
        is_feature = node.kind in (Kind.FEATURE, Kind.DECODER)
        drawn.append(
            {
                "name": words.node(described),
                "label": "" if node.of is not None else _label(node, described, features),
                "kind": node.kind.value,
                "x": x,
                "y": levels[y],
                "value": described["value"],
                "influence": described.get("influence"),
                "strength": strength(size, largest),
                "token": node.token,
                "is_beside": node.of is not None,
                "card": f"{node.layer}:{node.index}" if is_feature else None,
            }
        )
    return {
        "title": title,
        "root": graph.get("root", 0),  # targets come first in an attribution graph
        "nodes": drawn,
        "edges": [
            {**edge, "strength": strength(edge["value"], largest_edge)}
            for edge in sorted(graph["edges"], key=lambda edge: abs(edge["value"]))
        ],
        "columns": [column._asdict() for column in layout.columns],
        "layers": [
            {"name": "output" if layer in outputs else f"layer {layer}", "y": levels[layer]} for layer in layers
        ],
        "top": max(levels.values(), default=0.0),
        "places": {node: place for place, node in enumerate(nodes)},
    }


class TokenColumn(NamedTuple):
    """The column of a token; of nodes without one for None."""

    token: int | None
    start: float
    width: float


class Layout(NamedTuple):
    """Places (x, y) of nodes in units of one node's width and one layer, and the columns of tokens."""

    places: dict[Node, tuple[float, float]]
    columns: list[TokenColumn]


def height_of(node: Node) -> float:
    """Return the place along the layers: L before attention of layer L, L + 0.5 at its MLP.

    What lies beside a node is a quarter of a layer before it.
    """
    if node.of is not None:
        return height_of(node.of) - 0.25
    layer = float(node.layer or 0)
    return layer + 0.5 if node.reads_at != "resid_pre" else layer


def squeezed(heights: Iterable[float]) -> dict[float, float]:
    """Return where each height is drawn, from 0: what spans empty layers is short, so that what matters is large.

    Order is kept, and heights at most one layer apart keep their distance.
    """
    levels = sorted(set(heights))
    drawn = dict.fromkeys(levels[:1], 0.0)
    for below, here in itertools.pairwise(levels):
        gap = here - below
        drawn[here] = drawn[below] + min(gap, 1 + _EMPTY_LAYER * (gap - 1))
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
        columns.append(TokenColumn(token, start, float(widths[token])))
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
