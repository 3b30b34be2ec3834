"""Filters of nodes and of paths: conditions that must all hold."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.circuits.nodes import KINDS, Kind, Node, NodeColumns, node_columns
from tailrace.storage.errors import SettingsError

FIELDS = ("kind", "layer", "token", "head", "feature", "place")
COMPARATORS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
POINTS = ("resid_pre", "resid_mid", "mlp_out")
"""Values of the field ``place``: the point of its layer at which a node reads or writes, in the order of a pass."""
_WRITTEN = re.compile(r"\s*([a-z]+)\s*(!=|>=|<=|==?|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A comparison of a field of a node with a value.

    A field that a node does not have (the head of a feature, the token of a sum) fails every comparison but ``!=``.
    ``place`` is resid_pre, resid_mid or mlp_out, ordered as a forward pass has them.
    """

    field: str
    comparator: str
    value: int | str

    def __post_init__(self) -> None:
        problems = []
        if self.field not in FIELDS:
            problems.append(f"field {self.field!r} is not one of {', '.join(FIELDS)}")
        if self.comparator not in COMPARATORS:
            problems.append(f"comparator {self.comparator!r} is not one of {', '.join(COMPARATORS)}")
        named = {"kind": tuple(kind.value for kind in KINDS), "place": POINTS}.get(self.field)
        if named is not None and self.value not in named:
            problems.append(f"{self.field} {self.value!r} is not one of {', '.join(named)}")
        if named is None and not isinstance(self.value, int):
            problems.append(f"{self.field} {self.value!r} is not a whole number")
        if self.field == "kind" and self.comparator not in ("=", "!="):
            problems.append("kinds have no order: use = or !=")
        if problems:
            raise SettingsError(f"filter {self}: {'; '.join(problems)}")

    def __str__(self) -> str:
        return f"{self.field}{self.comparator}{self.value}"

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read ``token!=9``, ``kind=head``, ``layer<8``. Raises SettingsError for anything else."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise SettingsError(
                f"filter {text!r}: write a field, a comparator and a value, such as token!=9, kind=head or layer<8; "
                f"fields are {', '.join(FIELDS)}"
            )
        field, comparator, value = match[1], match[2].replace("==", "="), match[3]
        number = int(value) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else value
        return cls(field, comparator, number)

    def holds(self, nodes: NodeColumns) -> NDArray[np.bool_]:
        """Return for which of the nodes the condition holds."""
        compare = COMPARATORS[self.comparator]
        if self.field == "kind":
            return np.asarray(compare(nodes.kind, KINDS.index(Kind(str(self.value)))))
        if self.field == "place":
            own = np.array([POINTS.index(Node(kind).reads_at) for kind in KINDS])[nodes.kind]
            return np.asarray(compare(own, POINTS.index(str(self.value))))
        values, there = self._numbers(nodes)
        return np.where(there, compare(values, self.value), self.comparator == "!=")

    def _numbers(self, nodes: NodeColumns) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        if self.field in ("layer", "token"):
            values: NDArray[np.int32] = getattr(nodes, self.field)
            return values, values >= 0
        kinds = (Kind.HEAD,) if self.field == "head" else (Kind.FEATURE, Kind.DECODER)
        return nodes.index, nodes.are(*kinds) & (nodes.index >= 0)


@dataclass(frozen=True)
class NodeFilter:
    """Conditions that must all hold; without any, every node matches."""

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> NodeFilter:
        """Read conditions as ``Condition.parse`` does; raises SettingsError with every problem."""
        conditions, problems = [], []
        for text in texts:
            try:
                conditions.append(Condition.parse(text))
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(tuple(conditions))

    def holds(self, nodes: NodeColumns) -> NDArray[np.bool_]:
        """Return which of the nodes match."""
        matching = np.ones(nodes.n_nodes, np.bool_)
        for condition in self.conditions:
            matching &= condition.holds(nodes)
        return matching

    def matches(self, node: Node) -> bool:
        """Return whether one node matches."""
        return bool(self.holds(node_columns([node]))[0])


def has_infix(nodes: Sequence[Node], pattern: Sequence[NodeFilter]) -> bool:
    """Return whether consecutive nodes anywhere match a sequence of filters; an empty sequence always does."""
    starts = range(len(nodes) - len(pattern) + 1)
    return any(_match_from(nodes, start, pattern) for start in starts)


def has_suffix(nodes: Sequence[Node], pattern: Sequence[NodeFilter]) -> bool:
    """Return whether the last nodes match a sequence of filters."""
    return len(nodes) >= len(pattern) and _match_from(nodes, len(nodes) - len(pattern), pattern)


def _match_from(nodes: Sequence[Node], start: int, pattern: Sequence[NodeFilter]) -> bool:
    return all(item.matches(nodes[start + offset]) for offset, item in enumerate(pattern))
