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
_FORMS = {
    Kind.FEATURE: ("Layer {layer}, feature {index} at {at}", "feature {layer}:{index} at {at}"),
    Kind.DECODER: (
        "Layer {layer}, direction of feature {index} at {at}",
        "direction of feature {layer}:{index} at {at}",
    ),
    Kind.HEAD: ("Layer {layer}, head {index} reading {at}", "head {layer}.{index} from {at}"),
    Kind.SKIP: ("Layer {layer}, skip path at {at}",) * 2,
    Kind.EMBEDDING: ("Token {at}", "token {at}"),
    Kind.POSITION: ("Position {token}",) * 2,
}
"""What a node of a kind is called in a heading, and as a step of a path."""
_OF_LAYER = {
    Kind.ERROR: "transcoder's error",
    Kind.MLP: "MLP",
    Kind.ATTENTION_BIAS: KINDS[Kind.ATTENTION_BIAS],
    Kind.DECODER_BIAS: KINDS[Kind.DECODER_BIAS],
}
"""What a node that is of a layer, or of all, is called."""
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
            return f"{KINDS[node.kind].capitalize()} of {self._name(node.of)}"
        return str(described.get("text") or self._name(node))

    def step(self, node: Node) -> str:
        """Return a node's name as a step of a path."""
        if node.kind is Kind.MLP:
            return f"MLP {node.layer} at {self._at(node)}"
        return self._name(node, 1)

    def path(self, steps: Sequence[JSON]) -> list[str]:
        """Return the steps behind the root, each with what reaches the root along the path; ``*`` if capped."""
        return [
            f"{self.step(read_node(step['node']))} {show_value(step['value'])}{'*' if step.get('is_capped') else ''}"
            for step in steps[1:]
        ]

    def _name(self, node: Node, form: int = 0) -> str:
        if node.kind in _FORMS:
            numbers = {"layer": node.layer, "index": node.index, "token": node.token}
            return _FORMS[node.kind][form].format(**numbers, at=self._at(node))
        if node.kind in _OF_LAYER and node.layer is not None:
            return f"Layer {node.layer}, {_OF_LAYER[node.kind]}" + (
                "" if node.token is None else f" at {self._at(node)}"
            )
        if node.kind in KINDS:
            return KINDS[node.kind].capitalize()
        return self.root() if node == self._root and self._logits else str(node)

    def _at(self, node: Node) -> str:
        return "all tokens" if node.token is None else self._token(node.token)

    def _token(self, position: int) -> str:
        return quoted(self._tokens[position])
