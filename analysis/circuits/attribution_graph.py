"""Attribution graphs: every active feature, error and token of a prompt with the direct effects between them.

A graph begins at its targets (logits, or one feature). Features get rows of their own, in blocks, those with the
largest influence on the rows so far, until there are as many as asked for; the others are summed into one number per
row, so that rows still add up (Ameisen et al. 2025, "Circuit Tracing", sections "Constructing an attribution graph"
and "Pruning").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.circuits.attribution import Sources, attribute, list_sources
from tailrace.analysis.circuits.influence import Pruned, influences, prune, shares
from tailrace.analysis.circuits.nodes import Kind, Node, NodeColumns, node_columns
from tailrace.analysis.circuits.readers import feature_probe
from tailrace.analysis.circuits.roots import Root
from tailrace.analysis.circuits.run import LinearisedRun, Probe


@dataclass(frozen=True)
class GraphSettings:
    """Size of a graph, and the share of it that is kept."""

    max_features: int = 512
    """Features whose own inputs are computed. Memory while building: one number per feature and active feature of the
    prompt, error and token."""
    block: int = 64
    """Features pulled back through the model at once."""
    node_threshold: float = 0.8
    """Share of all influence that the nodes kept must have."""
    edge_threshold: float = 0.98
    """Share of the flow between these nodes that the edges kept must carry."""


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """A graph of n nodes: targets first, then features, errors and MLPs, embeddings, positions."""

    nodes: tuple[Node, ...]
    adjacency: Tensor
    """(n, n) [target, source] what the source contributes; a row and its constants sum to the target's value. On the
    CPU, as the rest."""
    values: Tensor
    """(n,) a target's value, a feature's activation; zero for nodes without a row."""
    constants: Tensor
    """(n,) what biases contribute to a row."""
    unexpanded: Tensor
    """(n,) contributions of features that are no nodes."""
    incoming: Tensor
    """(n,) Σ|contributions| of a row, features that are no nodes included, constants not."""
    weights: Tensor
    """(n,) weight of each target: a logit's probability; zero for all other nodes."""
    n_targets: int
    n_active: int
    """Active features of the prompt, nodes or not."""

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    def are(self, *kinds: Kind) -> Tensor:
        """Return (n,) bool which nodes are of some kinds, targets left out."""
        are = torch.from_numpy(node_columns(self.nodes).are(*kinds))
        are[: self.n_targets] = False
        return are

    def incompleteness(self) -> float:
        """Return the largest |Σ row − value| / Σ|row| over nodes with a row."""
        rows = self.adjacency.double().sum(dim=1) + self.constants.double() + self.unexpanded.double()
        sizes = self.incoming.double() + self.constants.double().abs()
        has_row = sizes > 0
        return float(((rows - self.values.double()).abs()[has_row] / sizes[has_row]).max())

    def pruned(self, settings: GraphSettings) -> Pruned:
        """Return which nodes and edges are kept; targets and tokens always are."""
        return prune(
            self.adjacency,
            self.weights,
            self.are(Kind.EMBEDDING, Kind.POSITION),
            needs_incoming=self.are(Kind.FEATURE),
            node_threshold=settings.node_threshold,
            edge_threshold=settings.edge_threshold,
            incoming=self.incoming,
        )

    def replacement_score(self) -> float:
        """Return the share of the targets that comes, along every route, from tokens and not from errors.

        Routes through features that are no nodes are left out. 1 where transcoders miss nothing.
        """
        influence = influences(shares(self.adjacency, self.incoming), self.weights)
        tokens = float(influence[self.are(Kind.EMBEDDING, Kind.POSITION)].sum())
        errors = float(influence[self.are(Kind.ERROR, Kind.MLP)].sum())
        return tokens / (tokens + errors) if tokens + errors > 0 else 1.0


def build_graph(
    run: LinearisedRun,
    roots: Sequence[Root],
    weights: Sequence[float],
    settings: GraphSettings,
    *,
    progress: Callable[[int, int], object] = lambda n, of: None,  # noqa: ARG005 - as it is called
) -> AttributionGraph:
    """Return the graph of ``roots`` with ``weights``: probabilities of logits, 1 for a feature.

    ``progress`` is called with how many features have their inputs, and of how many.
    """
    with torch.inference_mode():
        return _Builder(run, roots, weights, settings).build(progress)


def top_logits(
    run: LinearisedRun, token: int = -1, *, mass: float = 0.95, at_most: int = 10
) -> list[tuple[int, float]]:
    """Return the fewest token ids, with probabilities, that have ``mass`` of the prediction at a position."""
    logits = (run.normalised[token] @ run.weights.W_U.to(run.dtype)).double()
    logits = logits if run.weights.b_U is None else logits + run.weights.b_U.double()
    if run.weights.logit_cap is not None:
        logits = run.weights.logit_cap * torch.tanh(logits / run.weights.logit_cap)
    probabilities, ids = logits.softmax(dim=0).topk(min(at_most, len(logits)))
    n = int((probabilities.cumsum(0) < mass).sum()) + 1
    return list(zip(ids[:n].tolist(), probabilities[:n].tolist(), strict=True))


class _Builder:
    """A graph while its rows are computed. Columns are the sources that are nodes; constants come after them."""

    def __init__(
        self, run: LinearisedRun, roots: Sequence[Root], weights: Sequence[float], settings: GraphSettings
    ) -> None:
        self._run, self._roots, self._settings = run, roots, settings
        self._sources: Sources = list_sources(run)
        self._n_columns = self._sources.attention_bias.start
        self._columns: NodeColumns = self._sources.nodes.take(np.arange(self._n_columns))
        self._are_features = torch.from_numpy(self._columns.are(Kind.FEATURE))
        self._layers = torch.from_numpy(self._columns.layer.astype(np.int64))
        n_rows = len(roots) + min(settings.max_features, int(self._are_features.sum()))
        self._rows = torch.zeros(n_rows, self._n_columns, dtype=run.dtype)
        self._constants = torch.zeros(n_rows, dtype=run.dtype)
        self._n = 0
        self._expanded: list[int] = []
        self._weights = torch.tensor(weights, dtype=run.dtype)

    def build(self, progress: Callable[[int, int], object]) -> AttributionGraph:
        targets = [root.probe for root in self._roots]
        self._append(attribute(self._run, targets, self._sources))
        n_wanted = len(self._rows) - len(self._roots)
        progress(0, n_wanted)
        while len(self._expanded) < n_wanted:
            chosen = self._most_influential(min(self._settings.block, len(self._rows) - self._n))
            if not chosen:
                break
            probes = [self._probe(column) for column in chosen]
            self._expanded += chosen
            self._append(attribute(self._run, probes, self._sources))
            progress(len(self._expanded), n_wanted)
        return self._graph()

    def _append(self, rows: Tensor) -> None:
        rows, end = rows.cpu(), self._n + len(rows)
        self._rows[self._n : end] = rows[:, : self._n_columns]
        self._constants[self._n : end] = rows[:, self._n_columns :].sum(dim=1)
        self._n = end

    def _probe(self, column: int) -> Probe:
        at = self._columns
        return feature_probe(self._run, int(at.layer[column]), int(at.token[column]), int(at.index[column]))

    def _most_influential(self, n: int) -> list[int]:
        """Return the columns of the ``n`` features without a row of largest influence above zero."""
        influence = self._column_influences()
        candidates = influence * self._are_features
        candidates[self._expanded] = 0
        values, columns = candidates.topk(min(n, len(candidates)))
        return [int(column) for column in columns[values > 0]]

    def _column_influences(self) -> Tensor:
        """Return (n_columns,) the share of the targets that comes from each column through the rows so far.

        A feature contributes to later layers only, so from the last layer to the first every row's own influence is
        complete when it is used.
        """
        rows = self._rows[: self._n]
        sizes = rows.abs().sum(dim=1)
        n_roots = len(self._roots)
        total = self._weights @ shares(rows[:n_roots], sizes[:n_roots])
        expanded = torch.tensor(self._expanded, dtype=torch.int64)
        for layer in sorted({int(number) for number in self._layers[expanded]}, reverse=True):
            here = torch.nonzero(self._layers[expanded] == layer).flatten()
            at = n_roots + here
            total = total + total[expanded[here]] @ shares(rows[at], sizes[at])
        return total

    def _graph(self) -> AttributionGraph:
        rows, n_roots = self._rows[: self._n], len(self._roots)
        expanded = torch.tensor(self._expanded, dtype=torch.int64)
        others = torch.nonzero(~self._are_features & (rows != 0).any(dim=0)).flatten()
        shown = torch.cat([expanded, others])
        n = n_roots + len(shown)
        adjacency = rows.new_zeros(n, n)
        adjacency[: self._n, n_roots:] = rows[:, shown]
        values, constants, unexpanded, incoming, weights = (rows.new_zeros(n) for _ in range(5))
        hidden = self._are_features.clone()
        hidden[expanded] = False
        unexpanded[: self._n] = rows @ hidden.to(rows.dtype)
        incoming[: self._n] = rows.abs().sum(dim=1)
        constants[: self._n] = self._constants[: self._n]
        weights[:n_roots] = self._weights
        values[:n_roots] = torch.tensor([root.value for root in self._roots], dtype=rows.dtype)
        if self._run.transcoders:
            activations = torch.cat([layer.activation for layer in self._run.transcoders.values()]).cpu()
            values[n_roots : self._n] = activations[(self._are_features.cumsum(0) - 1)[expanded]]
        return AttributionGraph(
            nodes=(*(root.node for root in self._roots), *self._columns.nodes(shown.numpy())),
            adjacency=adjacency,
            values=values,
            constants=constants,
            unexpanded=unexpanded,
            incoming=incoming,
            weights=weights,
            n_targets=n_roots,
            n_active=int(self._are_features.sum()),
        )
