"""Circuits in words: what was asked, nodes and paths, with the prompt's tokens and without losing a number.

``mlp0tc[125]@5`` of ``circuit.json`` is "Layer 0, feature 125 at ' United'" on the page, and in a path "feature 0:125
at ' United'".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailrace.analysis.circuits.documents import read_node
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.paths import show_value
from tailrace.analysis.dashboards.values import visible_token

JSON = dict[str, Any]
KINDS = {
    Kind.FEATURE: "features",
    Kind.HEAD: "heads",
    Kind.SKIP: "skip paths",
    Kind.EMBEDDING: "token embeddings",
    Kind.POSITION: "position embeddings",
    Kind.ERROR: "transcoders' errors",
    Kind.MLP: "MLPs without transcoder",
    Kind.ATTENTION_BIAS: "attention biases",
    Kind.DECODER_BIAS: "decoder biases",
    Kind.BIAS: "own bias",
    Kind.PRUNED: "left out",
}
"""Kinds of the terms that add up to a root, or lie beside a node."""
_PROMPT = 60
"""Letters of a prompt in a question; the beginning of a longer one is left out."""


def quoted(text: str) -> str:
    """Return a token between quotes, with a sign for what could not be seen."""
    return f"'{visible_token(text)}'"


class Words:
    """The words for the nodes of one ``circuit.json``."""

    def __init__(self, document: JSON) -> None:
        self._prompt = str(document["prompt"])
        self._tokens = [token["text"] for token in document["tokens"]]
        self._root = read_node(document["root"]["node"])
        self._logits = document["root"].get("logits", [])

    def question(self) -> str:
        """Return what was asked, as a question."""
        root = self._root
        position = root.token or 0
        at_end = position == len(self._tokens) - 1
        said = self._prompt if at_end else "".join(self._tokens[1 : position + 1]).strip()
        said = quoted(said if len(said) <= _PROMPT else f"…{said[-_PROMPT:]}")
        if root.kind is Kind.LOGIT and self._logits:
            return f"Why {quoted(self._logits[0])} after {said}?"
        if root.kind is Kind.LOGIT_DIFFERENCE and self._logits:
            return f"Why {quoted(self._logits[0])} rather than {quoted(self._logits[1])} after {said}?"
        here = f"at {self._token(position)} in {said}"
        if root.kind is Kind.DECODER:
            return f"Why does the MLP of layer {root.layer} write feature {root.index} {here}?"
        return f"Why does feature {root.index} of layer {root.layer} fire {here}?"

    def root(self) -> str:
        """Return what was explained, short enough to stand before its value."""
        if self._logits:
            return " − ".join(map(quoted, self._logits))
        return self.step(self._root)

    def node(self, described: JSON) -> str:
        """Return a node's name as a heading."""
        node = read_node(described)
        if node == self._root and self._logits:
            return self.root()
        if node.of is not None:
            return f"{KINDS[node.kind].capitalize()} of {self._long(node.of)}"
        return str(described.get("text") or self._long(node))

    def step(self, node: Node) -> str:
        """Return a node's name as a step of a path."""
        at = "all tokens" if node.token is None else self._token(node.token)
        match node.kind:
            case Kind.FEATURE:
                return f"feature {node.layer}:{node.index} at {at}"
            case Kind.DECODER:
                return f"direction of feature {node.layer}:{node.index} at {at}"
            case Kind.HEAD:
                return f"head {node.layer}.{node.index} from {at}"
            case Kind.EMBEDDING:
                return f"token {at}"
            case Kind.MLP:
                return f"MLP {node.layer} at {at}"
        return self._long(node)

    def path(self, steps: Sequence[JSON]) -> list[str]:
        """Return the steps behind the root, each with what reaches the root along the path; ``*`` if capped."""
        return [
            f"{self.step(read_node(step['node']))} {show_value(step['value'])}{'*' if step.get('is_capped') else ''}"
            for step in steps[1:]
        ]

    def _long(self, node: Node) -> str:
        at = "all tokens" if node.token is None else self._token(node.token)
        match node.kind:
            case Kind.FEATURE:
                return f"Layer {node.layer}, feature {node.index} at {at}"
            case Kind.DECODER:
                return f"Layer {node.layer}, direction of feature {node.index} at {at}"
            case Kind.HEAD:
                return f"Layer {node.layer}, head {node.index} reading {at}"
            case Kind.SKIP:
                return f"Layer {node.layer}, skip path at {at}"
            case Kind.EMBEDDING:
                return f"Token {at}"
            case Kind.POSITION:
                return f"Position {node.token}"
            case Kind.ERROR | Kind.MLP | Kind.ATTENTION_BIAS | Kind.DECODER_BIAS if node.layer is not None:
                what = {Kind.ERROR: "transcoder's error", Kind.MLP: "MLP"}.get(node.kind, KINDS.get(node.kind, ""))
                return f"Layer {node.layer}, {what}" + ("" if node.token is None else f" at {at}")
            case kind if kind in KINDS:
                return KINDS[kind].capitalize()
        return self.root() if node == self._root and self._logits else str(node)

    def _token(self, position: int) -> str:
        return quoted(self._tokens[position])
