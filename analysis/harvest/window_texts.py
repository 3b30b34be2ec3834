"""Texts of windows of tokens, in which a character that was split over tokens stands whole.

Tokens that are parts of characters are rare in most text and most of it in some (Chinese under GPT-2's tokenizer), so
what is put together is each run of such tokens, and of equal runs that come soon again one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailrace.storage.token_text import has_bytes, join_characters

MOST_KEPT = 1 << 14
"""Runs that are kept before all are forgotten: 50 MB if each fills a window. Some texts have no end of them."""


class WindowTexts:
    """A vocabulary, and the latest runs of tokens that were put together."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = pa.array(vocabulary, pa.string())
        """Texts by token id, each on its own."""
        self._is_partial = np.fromiter(map(has_bytes, vocabulary), bool, len(vocabulary))
        self._joined: dict[tuple[int, ...], list[str]] = {}

    def of(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> pa.Array:
        """Return the text of each of ``tokens``: windows of the given lengths, end to end.

        A token that only begins a character is the empty string, and the token that completes it has the character;
        what a window's ends cut off stays ``<0xE6>``.
        """
        texts = self.vocabulary.take(pa.array(tokens))
        is_partial = self._is_partial[tokens]
        if not is_partial.any():
            return texts
        window = np.repeat(np.arange(len(lengths)), lengths)
        starts, stops = _runs(is_partial, window)
        places = np.flatnonzero(is_partial)
        replaced = [text for start, stop in zip(starts, stops, strict=True) for text in self._run(tokens[start:stop])]
        found = texts.to_numpy(zero_copy_only=False)
        found[places] = replaced
        return pa.array(found, pa.string())

    def _run(self, tokens: NDArray[np.integer]) -> list[str]:
        key = tuple(tokens.tolist())
        if key not in self._joined:
            if len(self._joined) >= MOST_KEPT:
                self._joined.clear()
            self._joined[key] = join_characters([self.vocabulary[token].as_py() for token in key])
        return self._joined[key]


def _runs(is_chosen: NDArray[np.bool_], window: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each run of chosen places within one window starts and stops."""
    group = np.where(is_chosen, window, -1)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(group)]])
    starts, stops = edges[:-1], edges[1:]
    is_run = is_chosen[starts]
    return starts[is_run], stops[is_run]
