"""Circuits as JSON: this project's own document, whose schema is in ``docs/guides/circuits.md``.

Nodes are objects with the fields of their keys; edges name nodes by their index in the list of nodes. Printed names are
for people and are never keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from tailrace.analysis.circuits.attribution_graph import AttributionGraph
from tailrace.analysis.circuits.contributions import Terms
from tailrace.analysis.circuits.influence import Pruned
from tailrace.analysis.circuits.nodes import KINDS, Kind, Node
from tailrace.analysis.circuits.path_graph import PathGraph
from tailrace.analysis.circuits.paths import Path, show_path
from tailrace.analysis.circuits.roots import Root
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.storage.artifact import Count, Record

JSON = dict[str, Any]


class NodeRecord(Record):
    """A node of a published circuit."""

    kind: Kind
    name: str
    layer: int | None = None
    token: int | None = None
    index: int | None = None
    influence: float | None = None
    of: NodeRecord | None = None


class _RootRecord(Record):
    node: NodeRecord
    value: float
    is_active: bool
    n_terms: Count
    incompleteness: float
    by_kind: dict[str, float]
    logits: list[str] = Field(default_factory=list)


class _TokenRecord(Record):
    text: str


class _StepRecord(Record):
    node: NodeRecord
    value: float


class _PathRecord(Record):
    steps: list[_StepRecord]


class _GraphRecord(Record):
    nodes: list[NodeRecord]
    edges: list[JSON]


class _AttributionRecord(_GraphRecord):
    n_nodes_before_pruning: Count
    replacement_score: float
    incompleteness: float


class CircuitDocument(Record):
    """What ``circuit.json`` holds, as far as it is read again."""

    prompt: str
    tokens: list[_TokenRecord]
    root: _RootRecord
    rounds: list[list[_PathRecord]]
    path_graph: _GraphRecord | None
    attribution_graph: _AttributionRecord | None


def describe_node(node: Node) -> JSON:
    """Return a node's key, without fields that it does not have, and its name."""
    fields = {"layer": node.layer, "token": node.token, "index": node.index, "other": node.other}
    of = {} if node.of is None else {"of": describe_node(node.of)}
    return {
        "kind": node.kind.value, **{key: value for key, value in fields.items() if value is not None}, **of,
        "name": str(node),
    }  # fmt: skip


def read_node(described: JSON) -> Node:
    """Return the node of which ``describe_node`` made the JSON."""
    of = described.get("of")
    layer, token, index, other = (described.get(name) for name in ("layer", "token", "index", "other"))
    return Node(Kind(described["kind"]), layer, token, index, other, None if of is None else read_node(of))


def describe_root(root: Root, terms: Terms) -> JSON:
    """Return a root, its terms by kind, and how exactly they add up to its value."""
    by_kind = {kind.value: terms.sum_of(kind) for kind in KINDS if terms.nodes.are(kind).any()}
    return {
        "node": describe_node(root.node),
        "value": root.value,
        "is_active": root.is_active,
        "n_terms": terms.nodes.n_nodes,
        "sum_of_terms": terms.total,
        "sum_of_magnitudes": terms.magnitude,
        "incompleteness": terms.incompleteness(root.value),
        "by_kind": by_kind,
        "from_bos": float(terms.values[terms.nodes.are(Kind.HEAD) & (terms.nodes.token == 0)].sum()),
    }


def describe_features(run: LinearisedRun, features: Iterable[tuple[int, int]]) -> list[JSON]:
    """Return of features, given by layer and index, at which tokens of the prompt they fire, the strongest first."""
    described = []
    for layer, index in sorted(features):
        active = run.transcoders[layer]
        pairs = np.flatnonzero(active.ids == index)
        fires = [{"token": int(active.token[pair]), "activation": float(active.activation[pair])} for pair in pairs]
        fires.sort(key=lambda one: -one["activation"])
        described.append({"layer": layer, "index": index, "fires_on": fires})
    return described


def describe_rounds(rounds: Sequence[Sequence[Path]]) -> list[list[JSON]]:
    """Return the paths of every round of a search."""
    return [[_describe_path(path) for path in paths] for paths in rounds]


def _describe_path(path: Path) -> JSON:
    steps = [
        {"node": describe_node(step.node), "value": step.value, **({"is_capped": True} if step.is_capped else {})}
        for step in path
    ]
    return {"text": show_path(path), "steps": steps}


def describe_path_graph(graph: PathGraph) -> JSON:
    """Return a graph of paths as JSON."""
    indices = {node: index for index, node in enumerate(graph.nodes)}
    return {
        "root": indices[graph.root],
        "nodes": [{**describe_node(node), "value": known.value} for node, known in graph.nodes.items()],
        "edges": [
            {"child": indices[child], "parent": indices[parent], "value": value}
            for (child, parent), value in graph.edges.items()
        ],
    }


def describe_attribution_graph(graph: AttributionGraph, pruned: Pruned, names: Sequence[str]) -> JSON:
    """Return the nodes and edges that were kept, and the rest of each row; ``names`` are the targets'."""
    kept = torch.nonzero(pruned.nodes).flatten().tolist()
    indices = {row: index for index, row in enumerate(kept)}
    shown = graph.adjacency * pruned.edges
    left_out = graph.adjacency.double().sum(1) - shown.double().sum(1) + graph.unexpanded.double()
    nodes = [
        {
            **describe_node(graph.nodes[row]),
            **({"text": names[row]} if row < graph.n_targets else {}),
            "value": float(graph.values[row]),
            "influence": float(pruned.influence[row]) if row >= graph.n_targets else None,
            "constants": float(graph.constants[row]),
            "pruned": float(left_out[row]),
        }
        for row in kept
    ]
    targets, sources = np.nonzero(pruned.edges.numpy())
    edges = [
        {"child": indices[int(source)], "parent": indices[int(target)], "value": float(graph.adjacency[target, source])}
        for target, source in zip(targets, sources, strict=True)
    ]
    return {
        "n_targets": graph.n_targets,
        "weights": [float(weight) for weight in graph.weights[: graph.n_targets]],
        "n_active_features": graph.n_active,
        "n_nodes_before_pruning": graph.n_nodes,
        "replacement_score": graph.replacement_score(),
        "incompleteness": graph.incompleteness(),
        "nodes": nodes,
        "edges": edges,
    }
