"""Influence in attribution graphs, and pruning by it (Ameisen et al. 2025, "Circuit Tracing", appendix "Graph
pruning").

A graph is a matrix A, (n, n): A[target, source] is what the source contributes to the target. With rows divided by the
sum of what comes in, in absolute value, a walk along edges multiplies shares, and Σ over all walks,
B = A + A² + … = (I − A)⁻¹ − I, is how much of a target comes from a source along every route. Nodes are ordered by
layer, so A is nilpotent and the sum ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pruned:
    """The nodes and edges of a graph that are kept."""

    nodes: Tensor
    """(n,) bool."""
    edges: Tensor
    """(n, n) bool, target by source."""
    influence: Tensor
    """(n,) share of the targets that comes through each node, in the full graph."""


def shares(adjacency: Tensor, incoming: Tensor | None = None) -> Tensor:
    """Return |A| with each row divided by ``incoming`` (n,), by default the row's own sum; rows of zeros stay."""
    sizes = adjacency.abs()
    total = sizes.sum(dim=1) if incoming is None else incoming
    return sizes / torch.where(total > 0, total, torch.ones_like(total))[:, None]


def influences(normalised: Tensor, weights: Tensor) -> Tensor:
    """Return (n,) w (A + A² + …) for shares ``normalised`` (n, n) and targets' weights w (n,).

    Raises ValueError if the sum does not end: the graph has a cycle.
    """
    total = torch.zeros_like(weights)
    step = weights
    for _ in range(len(weights) + 1):
        step = step @ normalised
        if not step.any():
            return total
        total = total + step
    raise ValueError("the graph has a cycle: influence runs along edges from later to earlier nodes only")


def prune(
    adjacency: Tensor,
    weights: Tensor,
    always: Tensor,
    *,
    needs_incoming: Tensor,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    incoming: Tensor | None = None,
) -> Pruned:
    """Return the fewest nodes with ``node_threshold`` of all influence, then the fewest edges among them likewise.

    ``weights`` (n,) are the targets', ``always`` (n,) bool are kept whatever their influence, as targets are;
    ``needs_incoming`` (n,) bool says which nodes make no sense without an edge into them (features). Nodes from which
    no edge leads to a target are dropped last. ``incoming`` (n,) is what a row is a share of, where the matrix
    does not show all that comes in.
    """
    targets = weights > 0
    influence = influences(shares(adjacency, incoming), weights)
    chosen = _fewest(influence, node_threshold) | always | targets
    # from here on among these only: a few hundred of a few thousand nodes, and edges are their square
    inner = shares(adjacency[chosen][:, chosen])
    flow = inner * (influences(inner, weights[chosen]) + weights[chosen])[:, None]
    edges = _fewest(flow.flatten(), edge_threshold).view_as(flow) & (flow > 0)
    may_end, may_start = (targets | always)[chosen], ~needs_incoming[chosen]
    nodes = torch.ones_like(may_end)
    while True:
        kept = nodes & (edges.any(dim=0) | may_end) & (edges.any(dim=1) | may_start)
        edges = edges & kept[:, None] & kept[None, :]
        if torch.equal(kept, nodes):
            break
        nodes = kept
    return Pruned(_spread(nodes, chosen), _spread(edges, chosen), influence)


def _spread(among: Tensor, chosen: Tensor) -> Tensor:
    """Return what is true of the chosen nodes, (m,) or (m, m), for all nodes; false for the others."""
    indices = torch.nonzero(chosen).flatten()
    full = torch.zeros((len(chosen),) * among.ndim, dtype=torch.bool)
    if among.ndim == 1:
        full[indices] = among
    else:
        full[indices[:, None], indices[None, :]] = among
    return full


def _fewest(values: Tensor, threshold: float) -> Tensor:
    """Return bool: the fewest of ``values`` (n,), largest first, with at least ``threshold`` of their sum."""
    ordered, indices = values.double().sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[indices] = before < threshold * ordered.sum()
    return chosen
