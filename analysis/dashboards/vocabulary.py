"""Token texts of a file, each kept once and named by its place: tokens repeat, their texts are long."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.analysis.dashboards.visible import visible_token


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
