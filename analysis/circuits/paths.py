"""Greedy search for the paths through which a root gets its value (Dunefsky et al. 2024, "Transcoders find
interpretable LLM feature circuits", section 4).

A path is a root and the steps that its value came through. Every step's value is its contribution to the *root* along
that path. A round extends all current paths by one step and keeps the best of all extensions together, so effects that
are spread over many small paths are missed: attribution graphs have those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.circuits.contributions import Terms, contributions
from tailrace.analysis.circuits.filters import NodeFilter, has_infix, has_suffix
from tailrace.analysis.circuits.nodes import EXTENDABLE, Kind, Node
from tailrace.analysis.circuits.readers import feature_probe, head_probe, skip_probe, written_direction
from tailrace.analysis.circuits.roots import Root
from tailrace.analysis.circuits.run import LinearisedRun, Part, Probe

SEARCHED = (Kind.FEATURE, Kind.HEAD, Kind.SKIP, Kind.EMBEDDING, Kind.POSITION, Kind.MLP)
"""Kinds of steps; errors and biases are added to graphs of paths, not searched."""


@dataclass(frozen=True, eq=False)
class Step:
    """A node of a path, with its contribution to the root."""

    node: Node
    probe: Probe | None
    """What the node reads, scaled so that its value is the step's; the next round extends it. None where paths end."""
    value: float
    """Contribution to the root; of the root itself its value."""
    is_capped: bool = False
    """Whether the value was cut to that of a feature nearer to the root, so that values no longer add up."""


Path = tuple[Step, ...]
"""The root first."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search for paths."""

    iterations: int = 2
    """Rounds, and so steps behind the root."""
    branches: int = 5
    """Paths kept after each round."""
    order: Literal["signed", "magnitude"] = "signed"
    """signed: largest contributions; magnitude: also those that inhibit."""
    cap: bool = False
    """Limit a step to the value of every feature it acts through: what would be lost if that feature were ablated."""
    ignore_bos: bool = True
    """Leave out what heads bring from position 0, which is large and depends on no token in particular."""
    extend_layer_0: bool = False
    """Go on from heads of layer 0 to the embeddings that they read, which says the same again."""
    keep: NodeFilter = field(default_factory=NodeFilter)
    """Which nodes may be steps; applied before the best are chosen."""


def root_step(root: Root) -> Step:
    """Return a root as the first step of a path."""
    return Step(root.node, root.probe, root.value)


def root_of_step(step: Step) -> Root:
    """Return a step as the root of another search: its probe unchanged, in units of the first root."""
    assert step.probe is not None, "paths end at embeddings, biases and MLPs: nothing there can be explained further"
    return Root(step.node, step.probe, step.value)


def search_paths(run: LinearisedRun, root: Root, settings: SearchSettings) -> list[list[Path]]:
    """Return the paths kept after each round, best first: those of round i have i + 2 steps.

    Ends early when no path can be extended; no round is empty.
    """
    current: list[Path] = [(root_step(root),)]
    rounds: list[list[Path]] = []
    for _ in range(settings.iterations):
        extended = [longer for path in current for longer in extensions(run, path, settings)]
        if not extended:
            break
        ranks = _ranks(np.array([path[-1].value for path in extended]), settings.order)
        current = [extended[index] for index in _best(ranks, np.ones(len(extended), np.bool_), settings.branches)]
        rounds.append(current)
    return rounds


def extensions(run: LinearisedRun, path: Path, settings: SearchSettings) -> list[Path]:
    """Return the best extensions of a path by one step, at most ``branches``; none where paths end."""
    probe, end = path[-1].probe, path[-1].node
    if probe is None or (end.kind is Kind.HEAD and end.layer == 0 and not settings.extend_layer_0):
        return []
    terms = contributions(run, probe)
    values, is_capped = _capped(terms.values, path) if settings.cap else (terms.values, np.zeros(0, np.bool_))
    allowed = terms.nodes.are(*SEARCHED) & settings.keep.holds(terms.nodes)
    if settings.ignore_bos:
        allowed &= ~(terms.nodes.are(Kind.HEAD) & (terms.nodes.token == 0))
    # a node that contributes nothing is no step, nor, in signed order, a node that inhibits
    allowed &= values > 0 if settings.order == "signed" else values != 0
    chosen = _best(_ranks(values, settings.order), allowed, settings.branches)
    return [
        (*path, _step(run, terms, int(index), probe, float(values[index]), bool(settings.cap and is_capped[index])))
        for index in chosen
    ]


def select_paths(
    paths: Iterable[Path],
    *,
    infix: Sequence[NodeFilter] | None = None,
    not_infix: Sequence[NodeFilter] | None = None,
    suffix: Sequence[NodeFilter] | None = None,
) -> list[Path]:
    """Return the paths for which all criteria given hold, in order.

    ``infix``: some consecutive steps match; ``not_infix``: none do; ``suffix``: the last steps match.
    """
    kept = []
    for path in paths:
        nodes = [step.node for step in path]
        if (
            (infix is None or has_infix(nodes, infix))
            and (not_infix is None or not has_infix(nodes, not_infix))
            and (suffix is None or has_suffix(nodes, suffix))
        ):
            kept.append(path)
    return kept


def top_ends(
    paths: Iterable[Path], *, by_token: bool = True, keep: NodeFilter | None = None, k: int = 5
) -> list[tuple[Node, float]]:
    """Return the nodes that paths end in with their summed contributions, largest first.

    Without ``by_token`` a node is summed over tokens. Raises ValueError for capped values, which do not add.
    """
    sums: dict[Node, float] = {}
    for path in paths:
        end = path[-1]
        refuse_capped(path)
        if keep is None or keep.matches(end.node):
            node = end.node if by_token else end.node.without_token()
            sums[node] = sums.get(node, 0.0) + end.value
    return sorted(sums.items(), key=lambda item: item[1], reverse=True)[:k]


def refuse_capped(path: Path) -> None:
    """Raise ValueError if a value of the path was cut: such values do not add up."""
    capped = [str(step.node) for step in path if step.is_capped]
    if capped:
        raise ValueError(f"values of {', '.join(capped)} were capped and do not add up; search with cap=False")


def _ranks(values: NDArray[np.float64], order: str) -> NDArray[np.float64]:
    return values if order == "signed" else np.abs(values)


def _best(ranks: NDArray[np.float64], allowed: NDArray[np.bool_], k: int) -> NDArray[np.integer]:
    indices = np.flatnonzero(allowed)
    return np.asarray(indices[np.argsort(-ranks[indices], kind="stable")[:k]])


def _capped(values: NDArray[np.float64], path: Path) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return values no further from zero than that, of the same sign, of any feature on the path.

    Without a feature its contribution to the root is lost, so nothing that acts through it can be worth more; a value
    of the other sign is not bounded by it.
    """
    known = [step.value for step in path if step.node.kind is Kind.FEATURE]
    ceiling = min((value for value in known if value > 0), default=np.inf)
    floor = max((value for value in known if value < 0), default=-np.inf)
    cut = np.clip(values, floor, ceiling)
    return cut, cut != values


def _step(run: LinearisedRun, terms: Terms, index: int, probe: Probe, value: float, is_capped: bool) -> Step:
    node = terms.nodes.node(index)
    return Step(node, _next_probe(run, node, probe) if node.kind in EXTENDABLE else None, value, is_capped)


def _next_probe(run: LinearisedRun, node: Node, probe: Probe) -> Probe:
    """Return what ``node`` reads, scaled by how strongly ``probe`` reads what it writes."""
    assert node.layer is not None
    assert node.token is not None
    if node.kind is Kind.HEAD:
        assert node.index is not None
        return head_probe(run, node.layer, node.index, probe.token, node.token, probe.vector)
    if node.kind is Kind.SKIP:
        return skip_probe(run, node.layer, node.token, written_direction(run, node.layer, node.token, probe))
    assert node.index is not None
    features = run.transcoders[node.layer]
    gain = 0.0
    for target in [probe.layer] if probe.part is Part.OUT else range(node.layer, probe.layer):
        if (decoder := features.writes(node.layer, target)) is not None:
            gain += float(decoder[node.index] @ written_direction(run, target, node.token, probe))
    return feature_probe(run, node.layer, node.token, node.index, gain=gain)


def show_path(path: Path, *, with_values: bool = True) -> str:
    """Return a path as a line; each value is a contribution to the root, two significant digits."""
    if not with_values:
        return " <- ".join(str(step.node) for step in path)
    return " <- ".join(f"{step.node}: {show_value(step.value)}{'*' if step.is_capped else ''}" for step in path)


def show_paths(paths: Sequence[Path], number: int | None = None) -> list[str]:
    """Return one line per path; the ``number`` of a round comes before the path's own number."""
    before = "" if number is None else f"[{number}]"
    return [f"Path {before}[{index}]: {show_path(path)}" for index, path in enumerate(paths)]


def show_value(value: float) -> str:
    """Return a number with two significant digits, without exponent where that stays short."""
    text = f"{value:.2g}"
    return f"{value:.0f}" if "e" in text and 10 <= abs(value) < 1e6 else text
