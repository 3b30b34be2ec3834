"""Nodes of circuits: a key for each quantity that is written to, or read from, the residual stream.

A key can be compared and hashed by its fields. Printed names are made from it and never read back: nodes with equal
labels may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class Kind(StrEnum):
    """Kind of a node."""

    FEATURE = "feature"
    """A transcoder's feature at a token."""
    HEAD = "head"
    """An attention head, reading one source token."""
    SKIP = "skip"
    """The linear path past the features of a skip transcoder."""
    EMBEDDING = "embedding"
    POSITION = "position"
    """The learned embedding of a position."""
    ERROR = "error"
    """What a transcoder misses of its MLP's output."""
    MLP = "mlp"
    """The output of an MLP that no transcoder stands in for: of that layer, or at that token."""
    ATTENTION_BIAS = "attention_bias"
    """What attention adds whatever it reads: b_O, and what norms and b_V add to it."""
    DECODER_BIAS = "decoder_bias"
    """What a transcoder adds whatever it reads: b_dec_out."""
    BIAS = "bias"
    """What the node itself adds whatever it reads: a feature's b_enc, the bias of the norm it reads through."""
    PRUNED = "pruned"
    """The rest of a node's value, which a search or a threshold left out."""
    DECODER = "decoder"
    """What an MLP's output has along a feature's decoder direction."""
    LOGIT = "logit"
    LOGIT_DIFFERENCE = "logit_difference"
    DIRECTION = "direction"
    """A direction that the user gave."""


CONSTANTS = (Kind.ATTENTION_BIAS, Kind.DECODER_BIAS, Kind.BIAS)
"""Kinds that do not depend on the prompt's tokens, but for patterns and scales."""
EXTENDABLE = (Kind.FEATURE, Kind.HEAD, Kind.SKIP)
"""Kinds that read the stream themselves, so that a path can continue through them."""
KINDS = tuple(Kind)
_CODES = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Node:
    """The key of a node. Which fields are set depends on its kind."""

    kind: Kind
    layer: int | None = None
    token: int | None = None
    """Position in the prompt, from 0: where a feature fires, the source of a head; None once tokens are summed."""
    index: int | None = None
    """Feature or head of its layer; token id of a logit; number of a direction."""
    other: int | None = None
    """The token id that is subtracted in a difference of logits."""
    of: Node | None = None
    """The node of whose sum this is a part; set for errors, biases and pruned parts."""

    @property
    def reads_at(self) -> str:
        """The point of its layer, as hook names have it: resid_pre, resid_mid or mlp_out."""
        if self.kind in (Kind.DECODER, Kind.ERROR, Kind.MLP, Kind.DECODER_BIAS):
            return "mlp_out"
        return "resid_mid" if self.kind in (Kind.FEATURE, Kind.SKIP) else "resid_pre"

    def without_token(self) -> Node:
        """Return the key under which the node's values at all tokens are summed; ``of`` is kept."""
        return replace(self, token=None, of=None if self.of is None else self.of.without_token())

    def __str__(self) -> str:
        name = label(self) if self.of is None else f"{label(self.of)}.{label(self)}"
        token = self.token if self.of is None else self.of.token
        return name if token is None else f"{name}@{token}"


def label(node: Node) -> str:
    """Return the short name of a node without its token: ``mlp8tc[89]``, ``attn2[2]``, ``embed0``."""
    match node.kind:
        case Kind.FEATURE:
            return f"mlp{node.layer}tc[{node.index}]"
        case Kind.DECODER:
            return f"mlp{node.layer}dec[{node.index}]"
        case Kind.HEAD:
            return f"attn{node.layer}[{node.index}]"
        case Kind.EMBEDDING:
            return "embed0"
        case Kind.POSITION:
            return "pos0"
        case Kind.ERROR:
            return "tc_error" if node.layer is None else f"tc_error{node.layer}"
        case Kind.LOGIT:
            return f"logit[{node.index}]"
        case Kind.LOGIT_DIFFERENCE:
            return f"logit[{node.index}-{node.other}]"
        case Kind.DIRECTION:
            return f"direction[{node.index}]"
        case _:
            return node.kind.value if node.layer is None else f"{node.kind.value}{node.layer}"


@dataclass(frozen=True, eq=False)
class NodeColumns:
    """Many nodes as columns of equal length; −1 stands for a field that is not set."""

    kind: NDArray[np.int8]
    """Index into ``KINDS``."""
    layer: NDArray[np.int32]
    token: NDArray[np.int32]
    index: NDArray[np.int32]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.kind)

    def node(self, row: int) -> Node:
        """Return the key of the node in a row."""
        numbers = (int(column[row]) for column in (self.layer, self.token, self.index))
        layer, token, index = (None if number < 0 else number for number in numbers)
        return Node(KINDS[self.kind[row]], layer, token, index)

    def nodes(self, rows: Iterable[int] | NDArray[np.integer]) -> list[Node]:
        """Return the keys of the nodes in some rows."""
        return [self.node(int(row)) for row in rows]

    def are(self, *kinds: Kind) -> NDArray[np.bool_]:
        """Return (n,) bool which nodes are of ``kinds``."""
        return np.isin(self.kind, [_CODES[kind] for kind in kinds])

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> NodeColumns:
        """Return the nodes in some rows."""
        return NodeColumns(self.kind[rows], self.layer[rows], self.token[rows], self.index[rows])


def columns_of(kind: Kind, layer: object = -1, token: object = -1, index: object = -1) -> NodeColumns:
    """Return nodes of one kind from numbers or arrays of numbers, broadcast against each other and flattened."""
    wide = np.broadcast_arrays(*(np.asarray(field, np.int32) for field in (layer, token, index)))
    layer_column, token_column, index_column = (np.atleast_1d(field).ravel() for field in wide)
    return NodeColumns(np.full(layer_column.size, _CODES[kind], np.int8), layer_column, token_column, index_column)


def joined_columns(parts: Sequence[NodeColumns]) -> NodeColumns:
    """Return the nodes of all parts, in order."""
    return NodeColumns(
        np.concatenate([part.kind for part in parts]),
        np.concatenate([part.layer for part in parts]),
        np.concatenate([part.token for part in parts]),
        np.concatenate([part.index for part in parts]),
    )


def node_columns(nodes: Sequence[Node]) -> NodeColumns:
    """Return keys as columns; what only keys hold (``other``, ``of``) is left out."""
    fields = [[-1 if value is None else value for value in (node.layer, node.token, node.index)] for node in nodes]
    numbers = np.array(fields, np.int32).reshape(len(nodes), 3)
    kinds = np.array([_CODES[node.kind] for node in nodes], np.int8)
    return NodeColumns(kinds, numbers[:, 0], numbers[:, 1], numbers[:, 2])
