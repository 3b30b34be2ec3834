"""Graphs of paths, in which every node adds up.

The value of an edge, or of a node, is what reaches the *root* through it over the paths kept. What the paths leave out
of a node is shown beside it as nodes of its own: the transcoders' errors, MLPs without transcoder,
constants, the node's own bias, and what was pruned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.paths import Path, refuse_capped
from tailrace.analysis.circuits.run import LinearisedRun, Probe

Edge = tuple[Node, Node]
"""(child, parent): the child contributes to the parent."""

BESIDE = (Kind.ERROR, Kind.MLP, Kind.ATTENTION_BIAS, Kind.DECODER_BIAS)
"""Kinds that are summed over layers into one node beside each parent, unless a path ends in one of them."""


@dataclass(frozen=True, eq=False)
class GraphNode:
    """A node's value and probe."""

    value: float
    """Contribution to the root over the paths kept; of the root its value."""
    probe: Probe | None = None
    """What it reads, summed over the paths that reach it; None where paths end, or tokens are summed."""


@dataclass(frozen=True, eq=False)
class PathGraph:
    """Nodes and edges by key, never by a printed name."""

    root: Node
    nodes: dict[Node, GraphNode]
    edges: dict[Edge, float]

    def incoming(self, parent: Node) -> dict[Node, float]:
        """Return the edges of a node by child."""
        return {child: value for (child, to), value in self.edges.items() if to == parent}

    @property
    def parents(self) -> list[Node]:
        """The nodes with incoming edges, in the order of the edges."""
        return list(dict.fromkeys(parent for _, parent in self.edges))


def graph_of_paths(paths: Iterable[Path]) -> PathGraph:
    """Return the graph of paths with the same root; a beginning that several paths share counts once.

    Raises ValueError for no paths, several roots, and capped values, which do not add up.
    """
    paths = list(paths)
    roots = {path[0].node for path in paths}
    if len(roots) != 1:
        raise ValueError(f"paths with {len(roots)} roots make no graph; wanted one root")
    values: dict[Node, float] = {}
    probes: dict[Node, Probe] = {}
    edges: dict[Edge, float] = {}
    seen: set[tuple[Node, ...]] = set()
    for path in paths:
        refuse_capped(path)
        keys = tuple(step.node for step in path)
        for depth, step in enumerate(path):
            if (prefix := keys[: depth + 1]) in seen:
                continue
            seen.add(prefix)
            values[step.node] = values.get(step.node, 0.0) + step.value
            if step.probe is not None:
                known = probes.get(step.node)
                probes[step.node] = step.probe if known is None else known.plus(step.probe)
            if depth > 0:
                edge = (step.node, keys[depth - 1])
                edges[edge] = edges.get(edge, 0.0) + step.value
    (root,) = roots
    return PathGraph(root, {node: GraphNode(value, probes.get(node)) for node, value in values.items()}, edges)


def completed(run: LinearisedRun, graph: PathGraph) -> PathGraph:
    """Return the graph with nodes beside every node that has children, so that incoming edges sum to its value.

    ``bias`` of a node is scaled by how strongly it reaches the root, as everything else in its sum is; ``pruned`` is
    what remains after all others.
    """
    nodes, edges = dict(graph.nodes), dict(graph.edges)
    for parent in graph.parents:
        known = graph.nodes[parent]
        assert known.probe is not None, "a node with children reads the stream"
        terms = contributions(run, known.probe)
        children = graph.incoming(parent)
        parts = {kind: terms.sum_of(kind) for kind in (*BESIDE, Kind.BIAS) if terms.nodes.are(kind).any()}
        for child, value in children.items():
            if child.kind in parts:  # already an edge of its own, for one layer
                parts[child.kind] -= value
        parts[Kind.PRUNED] = known.value - sum(children.values()) - sum(parts.values())
        for kind, value in parts.items():
            beside = Node(kind, token=parent.token, of=parent)
            nodes[beside] = GraphNode(value)
            edges[beside, parent] = value
    return PathGraph(graph.root, nodes, edges)


def summed_over_tokens(graph: PathGraph) -> PathGraph:
    """Return the graph with a node's values at all tokens summed; a node beside another stays beside it."""
    values: dict[Node, float] = {}
    for node, known in graph.nodes.items():
        key = node.without_token()
        values[key] = values.get(key, 0.0) + known.value
    edges: dict[Edge, float] = {}
    for (child, parent), value in graph.edges.items():
        edge = (child.without_token(), parent.without_token())
        edges[edge] = edges.get(edge, 0.0) + value
    return PathGraph(graph.root.without_token(), {node: GraphNode(value) for node, value in values.items()}, edges)
