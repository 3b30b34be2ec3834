"""Numbers and token texts as pages keep them: a few digits, a visible sign for every character, each text once.

A tokenizer's strings are arbitrary text. Left as they are, a line end breaks a line of examples, a zero-width space is
nothing at all, and a direction mark turns its neighbours around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

_DIGITS = 4
"""Significant digits kept: more than a page shows, and half the bytes of all of them."""

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_SPACE = "␣"
PART = "◌"
"""A token that only begins a character, which stands at a later token."""


def significant(values: ArrayLike, digits: int = _DIGITS) -> NDArray[np.float64]:
    """Return ``values`` rounded to ``digits`` significant decimal digits; zero, NaN and infinities stay as they are."""
    given = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log10(np.abs(given)))
        shift = np.where(np.isfinite(exponent), digits - 1 - exponent, 0.0)
        # A negative power of ten is no exact float, so the positive power divides instead.
        scaled = np.where(shift >= 0, given * 10.0 ** np.maximum(shift, 0), given / 10.0 ** np.maximum(-shift, 0))
        rounded = np.round(scaled)
        result = np.where(shift >= 0, rounded / 10.0 ** np.maximum(shift, 0), rounded * 10.0 ** np.maximum(-shift, 0))
    return np.where(np.isfinite(given) & (given != 0), result, given)


def rounded_list(values: ArrayLike, digits: int = _DIGITS) -> list[float | None]:
    """Return ``values`` as a list of rounded numbers; what is not finite becomes None."""
    return [value if np.isfinite(value) else None for value in significant(values, digits).tolist()]


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """Return a value with its floats rounded, everything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item, digits) for item in value]
    return value


def visible_token(text: str) -> str:
    """Return ``text`` with a visible sign for every character; spaces stay unless the token is nothing else."""
    if not text:
        return PART
    if not text.strip(" "):
        return _SPACE * len(text)
    return text if text.isprintable() else "".join(_visible_character(character) for character in text)


def visible_text(text: str) -> str:
    """Return ``text`` with a visible sign for every character but spaces and the ends of its lines."""
    return "\n".join("".join(map(_visible_character, line)) for line in text.split("\n"))


def _visible_character(character: str) -> str:
    """Return a character, its sign, or its code if it is not printable: a control, format, separator or unassigned."""
    if character.isprintable():
        return character
    return _SIGNS.get(character, f"[U+{ord(character):04X}]")


class Vocabulary:
    """Texts in the order first seen, made visible on the way in."""

    def __init__(self) -> None:
        self._indices: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        """Every text, at its index."""
        return list(self._indices)

    def index_of(self, token: str) -> int:
        """Return the index of a token's text, which is added if it is new."""
        return self._indices.setdefault(visible_token(token), len(self._indices))

    def indices_of(self, tokens: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the indices of the texts of many tokens, which may not be null."""
        if isinstance(tokens, pa.ChunkedArray):
            tokens = tokens.combine_chunks()
        if not pa.types.is_dictionary(tokens.type):
            tokens = tokens.dictionary_encode()
        known = np.array([self.index_of(text) for text in tokens.dictionary.to_pylist()], np.int64)
        indices: NDArray[np.int64] = known[np.asarray(tokens.indices)]
        return indices
