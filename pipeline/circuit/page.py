"""A circuit as one HTML file that opens from disk: graphs to pan and zoom, a card for every feature, the paths as text.

The data lies in the file as JSON in which every ``<`` is escaped, and the script writes it into the page as text, so
nothing of a prompt or a token can become markup or code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from tailrace.analysis.circuits.documents import read_node
from tailrace.analysis.circuits.layout import height_of, place_nodes, squeezed, strength
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.dashboards.visible import visible_token

JSON = dict[str, Any]
_TEMPLATE = files("tailrace.pipeline.circuit") / "page_files"
_OUTPUT = re.compile(r'Output "(.*)" \(p=.*\)', re.DOTALL)
"""What the viewers call a token that may come next; at a node there is room for the token alone."""


def render_page(document: JSON, cards: Mapping[tuple[int, int], JSON]) -> str:
    """Return the page of a ``circuit.json``; ``cards`` say what is known of features, by layer and index."""
    data = {
        "prompt": document["prompt"],
        "tokens": [visible_token(token["text"]) for token in document["tokens"]],
        "root": document["root"],
        "rounds": [[path["text"] for path in paths] for paths in document["rounds"]],
        "likely": [{**one, "text": visible_token(one["text"])} for one in document.get("likely", [])],
        "graphs": [graph for graph in _graphs(document, cards) if graph["nodes"]],
        "cards": {f"{layer}:{index}": card for (layer, index), card in cards.items()},
    }
    parts = {name: (_TEMPLATE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    page = parts["html"].replace("/*STYLE*/", parts["css"]).replace("/*SCRIPT*/", parts["js"])
    return page.replace("/*DATA*/", _escaped(data))


def features_shown(document: JSON) -> set[tuple[int, int]]:
    """Return layer and index of every feature that some graph or path of a circuit shows."""
    described = [
        node for name in ("path_graph", "attribution_graph") for node in (document[name] or {"nodes": []})["nodes"]
    ]
    described += [step["node"] for paths in document["rounds"] for path in paths for step in path["steps"]]
    kinds = (Kind.FEATURE.value, Kind.DECODER.value)
    return {(node["layer"], node["index"]) for node in [*described, document["root"]["node"]] if node["kind"] in kinds}


def _escaped(data: JSON) -> str:
    """Return JSON that cannot end the element it stands in, nor break a line of a script."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _graphs(document: JSON, cards: Mapping[tuple[int, int], JSON]) -> list[JSON]:
    names = {"path_graph": "Paths", "attribution_graph": "Attribution graph"}
    return [_drawn(title, document[name], cards) for name, title in names.items() if document[name] is not None]


def _label(node: Node, described: JSON, cards: Mapping[tuple[int, int], JSON]) -> str:
    """Return what is written at a node: row and column say its layer and token, so neither is repeated."""
    match node.kind:
        case Kind.FEATURE | Kind.DECODER:
            token = cards.get((node.layer or 0, node.index or 0), {}).get("top_token")
            return f"#{node.index}" if token is None else visible_token(token)
        case Kind.HEAD:
            return f"h{node.index}"
        case Kind.LOGIT:
            return visible_token(_OUTPUT.sub(r"\1", str(described.get("text", ""))))
    return ""


def _size(described: JSON) -> float:
    """Return how large a node is drawn; the targets of an attribution graph, which have no influence, as if all."""
    influence = described.get("influence", described["value"])
    return 1.0 if influence is None else float(influence)


def _drawn(title: str, graph: JSON, cards: Mapping[tuple[int, int], JSON]) -> JSON:
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
                "name": described.get("text", described["name"]),
                "label": "" if node.of is not None else _label(node, described, cards),
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
    }
