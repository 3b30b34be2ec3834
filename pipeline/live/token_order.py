"""Rows of fresh text in token order, computed when they are asked for: what `pipeline analyze --live` reads.

The text is packed first, which needs no model and 8 bytes a token, so it is known how many rows there are. A unit is a
run of whole batches on the model's fixed grid; reading one runs the model over its contexts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest.rows import ShownRows
from tailrace.pipeline.cache.recorded_model import explained_passes
from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.packing import TRAIN, ContextSource
from tailrace.pipeline.text.reading import choose_reading
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import TextError
from tailrace.storage.formats import LEFT_OUT

logger = logging.getLogger(__name__)

SPLIT = "live"
UNIT_ROWS = 65_536
"""Rows of a unit, about: its activations are in memory at once, in float32."""


class FreshSplit:
    """Rows of contexts (n, context_length) that a model is run over, unit by unit."""

    def __init__(
        self,
        maker: RowMaker,
        tokens: NDArray[np.int32],
        documents: NDArray[np.uint32],
        kept: NDArray[np.bool_],
        unit_rows: int = UNIT_ROWS,
    ) -> None:
        (self._site,) = maker.sites
        self._maker, self._per_batch = maker, maker.contexts_per_batch
        self._tokens, self._documents, self._kept = tokens, documents, kept
        batches = max(1, unit_rows // (self._per_batch * tokens.shape[1]))
        self._unit_contexts: int = batches * self._per_batch
        self._row_ends: list[int] = np.cumsum(kept.sum(axis=1)).tolist()
        self._read: tuple[int, dict[str, NDArray[Any]]] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of all contexts."""
        return self._row_ends[-1]

    @property
    def n_units(self) -> int:
        """Units of all contexts."""
        return -(-len(self._tokens) // self._unit_contexts)

    def first_row(self, unit: int) -> int:
        """Return the index in token order of a unit's first row."""
        return self._row_ends[unit * self._unit_contexts - 1] if unit else 0

    def read_unit(self, unit: int, keys: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """Return a unit's rows by context and position; runs the model unless this unit was the last one read.

        Raises NonFiniteActivation with the hook and the token, OutOfMemoryError with the batch size to try.
        """
        if self._read is None or self._read[0] != unit:
            self._read = None  # two units need not be in memory
            self._read = (unit, self._run(unit))
        rows = self._read[1]
        return {key: rows[key] for key in keys}

    def _run(self, unit: int) -> dict[str, NDArray[Any]]:
        start = unit * self._unit_contexts
        stop = min(start + self._unit_contexts, len(self._tokens))
        pieces = []
        for first in range(start, stop, self._per_batch):
            batch = slice(first, min(first + self._per_batch, stop))
            with explained_passes(self._per_batch):
                pieces.append(self._maker.rows(self._tokens[batch], self._documents[batch], first).arrays())
        name = self._site.name
        sides = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        context, position = np.nonzero(self._kept[start:stop])
        if f"{name}/out" not in sides:  # an autoencoder's
            sides[f"{name}/out"] = sides[f"{name}/in"]
        return {**sides, "context": start + context, "position": position}

    def dtype(self, key: str) -> str:  # noqa: ARG002 - the same for all
        """Return the dtype of activations."""
        return self._site.dtype

    def context_tokens(self, context_ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the token ids (contexts, positions) of contexts."""
        return np.asarray(self._tokens[context_ids])

    def context_documents(self, context_ids: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Return the document ids (contexts, positions) of contexts."""
        return np.asarray(self._documents[context_ids] & ~LEFT_OUT)


def fresh_rows(text: FreshText, model: LanguageModel, site: Site, n_rows: int) -> tuple[ShownRows, dict[str, Any]]:
    """Return ``n_rows`` rows of ``site`` on fresh text, or all there are, and what the text is, for a manifest.

    Raises TextError if the text cannot be read or gives no row, ModelError if contexts are longer than the model's.
    """
    documents = open_documents(text, text.seed)
    row_mask = text.rows_of(model)
    reading = choose_reading(text, model, documents)
    source = ContextSource.of(text, model, documents, {TRAIN: n_rows}, reading=reading)
    packed = [piece for piece in source if piece.split == TRAIN]
    if not packed or not sum(int(row_mask(piece.tokens, piece.documents).sum()) for piece in packed):
        raise TextError(
            f"{text.dataset}: gives no row: its documents do not fill a context of {text.context_length} tokens; give "
            "more text, or a shorter --context-length"
        )
    tokens, ids = (np.concatenate([getattr(piece, name) for piece in packed]) for name in ("tokens", "documents"))
    maker = RowMaker(model, [site], row_mask, text.contexts_per_batch)
    split = FreshSplit(maker, tokens, ids, row_mask(tokens, ids))
    if split.n_rows < n_rows:
        logger.warning("%s: has only %s rows of the %s wanted", text.dataset, f"{split.n_rows:,}", f"{n_rows:,}")
    first = split.read_unit(0, [f"{site.name}/out"])[f"{site.name}/out"]
    mean = first.mean(axis=0, dtype=np.float64)
    return ShownRows(split, SPLIT, site.name, mean, model.vocabulary()), documents.identity() | reading.as_json()
