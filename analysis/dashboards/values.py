"""Numbers and token texts as pages keep them: a few digits, something to see for every character, each text once.

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
        places = np.where(np.isfinite(exponent), digits - 1 - exponent, 0.0)
        # A power of ten above 10²² is no exact float: a number that small is divided by one instead.
        scaled = np.where(places >= 0, given * 10.0 ** np.maximum(places, 0), given / 10.0 ** np.maximum(-places, 0))
        rounded = np.round(scaled)
        found = np.where(places >= 0, rounded / 10.0 ** np.maximum(places, 0), rounded * 10.0 ** np.maximum(-places, 0))
    return np.where(np.isfinite(given) & (given != 0), found, given)


def rounded_list(values: ArrayLike, digits: int = _DIGITS) -> list[float | None]:
    """Return ``values`` as a list of rounded numbers; what is not finite becomes None."""
    return [value if np.isfinite(value) else None for value in significant(values, digits).tolist()]


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """Return one value as a page keeps it: floats rounded, everything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(item, digits) for item in value]
    return value


def visible_token(text: str) -> str:
    """Return ``text`` with something to see for every character; spaces stay unless the token is nothing else."""
    if not text:
        return PART
    if not text.strip(" "):
        return _SPACE * len(text)
    return text if text.isprintable() else "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    """Return a character, its sign, or its code if it has no glyph: controls, formats, separators, unassigned ones."""
    if character.isprintable():
        return character
    return _SIGNS.get(character, f"[U+{ord(character):04X}]")


class Vocabulary:
    """Texts in the order first seen, made visible on the way in."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        """Every text, at its place."""
        return list(self._places)

    def place(self, token: str) -> int:
        """Return the place of a token's text."""
        return self._places.setdefault(visible_token(token), len(self._places))

    def places(self, tokens: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the places of the texts of many tokens, which may not be null."""
        if isinstance(tokens, pa.ChunkedArray):
            tokens = tokens.combine_chunks()
        if not pa.types.is_dictionary(tokens.type):
            tokens = tokens.dictionary_encode()
        known = np.array([self.place(text) for text in tokens.dictionary.to_pylist()], np.int64)
        places: NDArray[np.int64] = known[np.asarray(tokens.indices)]
        return places
