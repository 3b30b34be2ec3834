"""Withholding of evidence until a hypothesis is on file: everything may be seen but what the text says.

Evidence is any JSON. Which of its strings are words of the text no program can tell for sure, so it is the other way
round: a string is shown only under a key that names a part of the model (``kind``, ``site``, …) and only if it is one
word, or if it is nothing but the notation of nodes (``mlp8tc[355]@-1 <- attn7[7]@35``). All others are withheld, and so
are numbers that are token ids by their key.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Mode = Literal["blind", "super-blind"]
"""blind: tokens of the text are withheld. super-blind: so is which features of a layer-0 transcoder were active on it,
since these are nearly the tokens themselves."""
Source = Literal["input", "weights"]
"""input: seen on a text. weights: the same whatever the text, such as pullbacks and de-embeddings, whose tokens are
part of the evidence; both modes show it."""

WITHHELD = "<withheld>"
NAMES = frozenset({"component", "hook", "kind", "place", "role", "site", "unit"})
"""Keys under which one word, a name of a part of the model, is shown."""
LOGITS = frozenset({"logit", "logit_difference", "logit difference"})
"""Each a ``kind`` of objects whose ``index`` and ``other`` are token ids."""

_NAME = re.compile(r"[\w.\[\]:-]+")
_BESIDE = r"(?:\.[a-z_]+\d*)?"  # of a node beside another: mlp8tc[355].bias@4
_NODE = rf"(?!logit)[a-z_]+\d*[a-z_]*(?:\[\d+\]{_BESIDE}(?:@-?\d+)?|{_BESIDE}@-?\d+)"
_STEP = rf"{_NODE}(?:: ?[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?\*?)?"
_NOTATION = re.compile(rf"{_STEP}(?: ?(?:<-|←|->|→) ?{_STEP})*")
_TOKEN_IDS = re.compile(r"(?:.*_)?token_ids?|ids?")
_LAYER_0 = re.compile(r"\bmlp0tc\b|\b(?:layer|blocks\.)0(?!\d)")
_FEATURE_KINDS = frozenset({"feature", "transcoder", "transcoder feature"})


def withhold(content: Any, *, mode: Mode, source: Source) -> Any:
    """Return a copy of ``content``, JSON, in which what the mode withholds is replaced by ``WITHHELD``.

    In super-blind mode an object is withheld completely if it is about a feature of layer 0: it has a ``feature`` or
    the ``kind`` of a feature, and ``layer`` 0, or a string under another of its keys that says so.
    """
    return content if source == "weights" else _without(content, "", mode)


def _without(value: Any, key: str, mode: Mode) -> Any:
    if isinstance(value, dict):
        if mode == "super-blind" and _is_feature_of_layer_0(value):
            return WITHHELD
        token_ids = ("index", "other", "name") if value.get("kind") in LOGITS else ()
        return {name: WITHHELD if name in token_ids else _without(inner, name, mode) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, key, mode) for inner in value]
    if isinstance(value, str):
        return value if _is_shown(value, key, mode) else WITHHELD
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return WITHHELD if is_number and _TOKEN_IDS.fullmatch(key) else value


def _is_shown(text: str, key: str, mode: Mode) -> bool:
    if mode == "super-blind" and _LAYER_0.search(text) is not None:
        return False
    return _NOTATION.fullmatch(text) is not None or (key in NAMES and _NAME.fullmatch(text) is not None)


def _is_feature_of_layer_0(value: dict[str, Any]) -> bool:
    if "feature" not in value and value.get("kind") not in _FEATURE_KINDS:
        return False
    named = any(isinstance(inner, str) and _LAYER_0.search(inner) is not None for inner in value.values())
    return value.get("layer") in (0, "0") or named
