"""Training contexts on the model's fixed grid, pass after pass over the text, continued from any batch.

One pass gives exactly the contexts that ``pipeline cache`` packs from the same text with the same held-out documents.
A batch of the grid may begin in the middle of what the packer hands out at once, so a position is the packer's state
before that piece and how many contexts of it lie before the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from tailrace.pipeline.text.packing import TRAIN, ContextSource, PackedContexts
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

logger = logging.getLogger(__name__)

OpenSource = Callable[[JSON | None], ContextSource]
"""Opens the text at a packing state, None being the beginning."""


@dataclass(frozen=True)
class TextPosition:
    """Where a batch of contexts begins."""

    text_pass: int = 0
    """Passes over the text that were finished before."""
    context: int = 0
    """Number of the batch's first context, counted over all passes."""
    packing: JSON = None
    """State of the packer before the piece that this context comes from; None at the beginning of the text."""
    skipped: int = 0
    """Contexts of that piece that come before."""

    def as_json(self) -> dict[str, Any]:
        """Return the position as JSON: a few thousand characters, however long the text."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the position written by ``as_json``."""
        return cls(**value)


@dataclass(frozen=True)
class TextBatch:
    """One pass of the model: contexts (contexts_per_batch, context_length) and the marked document of each token."""

    position: TextPosition
    tokens: np.ndarray
    documents: np.ndarray


class ContextBatches:
    """An endless iterator of full batches of training contexts; held-out documents are passed over.

    Raises TextError at the end of a pass that gave fewer rows than ``smallest_pass``.
    """

    def __init__(
        self,
        open_source: OpenSource,
        contexts_per_batch: int,
        start: TextPosition | None = None,
        *,
        smallest_pass: int = 1,
        name: str = "the text",
    ) -> None:
        start = start or TextPosition()
        self._open_source, self._per_batch = open_source, contexts_per_batch
        self._smallest_pass, self._name = smallest_pass, name
        self._text_pass, self._context = start.text_pass, start.context
        self._piece: PackedContexts | None = None
        self._open(start.packing)
        self._offset = start.skipped

    def _open(self, packing: JSON) -> None:
        self._source = self._open_source(packing)
        self._pieces = iter(self._source)
        self._before: JSON = packing
        self._offset = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextBatch:
        position, tokens, documents, n = None, [], [], 0
        while n < self._per_batch:
            piece = self._current_piece()
            if position is None:
                position = TextPosition(self._text_pass, self._context, self._before, self._offset)
            chosen = slice(self._offset, self._offset + self._per_batch - n)
            tokens.append(piece.tokens[chosen])
            documents.append(piece.documents[chosen])
            self._offset += len(tokens[-1])
            n += len(tokens[-1])
        assert position is not None, "a batch has at least one context"
        self._context += n
        return TextBatch(position, np.concatenate(tokens), np.concatenate(documents))

    def _current_piece(self) -> PackedContexts:
        """Return the piece that the next context comes from."""
        while self._piece is None or self._offset >= len(self._piece.tokens):
            if self._piece is not None:
                self._offset -= len(self._piece.tokens)
                self._before = self._source.state
            self._piece = self._next_piece()
        return self._piece

    def _next_piece(self) -> PackedContexts:
        while True:
            piece = next(self._pieces, None)
            if piece is None:
                self._begin_next_pass()
            elif piece.split == TRAIN:
                return piece
            else:
                self._before = self._source.state

    def _begin_next_pass(self) -> None:
        n_rows = self._source.counts[TRAIN]["rows"]
        if n_rows < self._smallest_pass:
            raise TextError(
                f"{self._name}: gives {n_rows:,} training rows in one pass, wanted at least {self._smallest_pass:,}, "
                "or a block of the buffer would hold rows twice; lower buffer_rows or batch_rows, or give more text"
            )
        self._text_pass += 1
        logger.info(
            "%s: ended after %s training rows; beginning pass %d", self._name, f"{n_rows:,}", self._text_pass + 1
        )
        self._open(None)
