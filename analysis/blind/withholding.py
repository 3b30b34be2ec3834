"""What of a piece of evidence may be seen before a hypothesis is on file: everything but what the text says.

Evidence is any JSON. Which of its strings are words of the text no program can tell for sure, so it is the other way
round: a string is shown only under a key that names a kind of thing (``site``, ``notation``, …) and only if it looks
like a name. All others are withheld, and so are numbers under keys that end in ``token_id`` or ``token_ids``.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Mode = Literal["blind", "super-blind"]
"""blind: tokens of the text are withheld. super-blind: so is which features of a layer-0 transcoder were active on it,
since these are nearly the tokens themselves."""
Source = Literal["input", "weights"]
"""input: seen on a text. weights: the same whatever the text, such as pullbacks and de-embeddings, whose tokens are
part of what is looked at; both modes show it."""

WITHHELD = "<withheld>"
SHOWN_KEYS = frozenset({"component", "hook", "kind", "notation", "role", "site", "unit"})
"""Keys whose strings are names of parts of the model."""

_NAME = re.compile(r"[\w.\[\]@:<>←→+ -]*")
_TOKEN_IDS = re.compile(r"(?:.*_)?token_ids?")
_LAYER_0 = re.compile(r"\bmlp0tc\b|\b(?:layer|blocks\.)0(?!\d)")
_FEATURE_KINDS = frozenset({"feature", "transcoder", "transcoder feature"})


def withhold(content: Any, *, mode: Mode, source: Source) -> Any:
    """Return a copy of ``content``, JSON, in which what the mode withholds is replaced by ``WITHHELD``.

    In super-blind mode an object is withheld whole if it is about a feature of layer 0: its ``site`` or ``notation``
    says so, or it has a ``feature`` (or a ``kind`` that is one) and ``layer`` 0.
    """
    if source == "weights":
        return content
    return _without(content, "", mode)


def _without(value: Any, key: str, mode: Mode) -> Any:
    if isinstance(value, dict):
        if mode == "super-blind" and _is_feature_of_layer_0(value):
            return WITHHELD
        return {name: _without(inner, name, mode) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, key, mode) for inner in value]
    if isinstance(value, str):
        return value if _is_shown(value, key, mode) else WITHHELD
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return WITHHELD if is_number and _TOKEN_IDS.fullmatch(key) else value


def _is_shown(text: str, key: str, mode: Mode) -> bool:
    if key not in SHOWN_KEYS or _NAME.fullmatch(text) is None:
        return False
    return mode == "blind" or _LAYER_0.search(text) is None


def _is_feature_of_layer_0(value: dict[str, Any]) -> bool:
    is_feature = "feature" in value or value.get("kind") in _FEATURE_KINDS
    named = any(
        isinstance(value.get(key), str) and _LAYER_0.search(value[key]) is not None for key in ("site", "notation")
    )
    return is_feature and (value.get("layer") == 0 or named)
