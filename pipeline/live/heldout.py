"""The held-out rows of live mode: computed once, kept in memory, never trained on.

Documents are chosen by the same rule as for a cache. Their rows are kept in random order, so that the first n of them
are always the same uniform sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import HELDOUT, ContextSource
from tailrace.pipeline.text.settings import RowMask
from tailrace.storage.errors import TextError
from tailrace.storage.shuffle import philox, random_permutation
from tailrace.training.rows.batches import EVALUATION_SEED

logger = logging.getLogger(__name__)


def read_heldout_contexts(
    source: ContextSource, rule: HoldoutRule, row_mask: RowMask, n_rows: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and marked documents of held-out contexts with ``n_rows`` rows, or all if the text has fewer.

    Reads no further than it must: ``source``, from the beginning of the text, is left behind the last one.
    Raises TextError if there is none.
    """
    n_listed = count_listed(rule)
    tokens: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    n_found = 0
    for piece in source:
        if piece.split == HELDOUT:
            tokens.append(piece.tokens)
            documents.append(piece.documents)
            n_found += int(row_mask(piece.tokens, piece.documents).sum())
        if n_found >= n_rows or (n_listed is not None and source.counts[HELDOUT]["documents"] >= n_listed):
            break
    if not n_found:
        raise TextError(
            f"{name}: its held-out documents give no row; name more or longer documents with --holdout, use a shorter "
            "--context-length, or --holdout 0"
        )
    if n_found < n_rows:
        logger.info("%s: has only %s held-out rows of the %s wanted", name, f"{n_found:,}", f"{n_rows:,}")
    return np.concatenate(tokens), np.concatenate(documents)


def count_listed(rule: HoldoutRule) -> int | None:
    """Return how many documents a rule lists; None if it lists none, or without end."""
    if not rule.listed or any(steps.stop is None for steps in rule.listed):
        return None
    listed = [range(steps.start, steps.stop, steps.step) for steps in rule.listed if steps.stop is not None]
    return len(set().union(*listed))


class HeldoutRows:
    """Rows by ``site/side`` in storage dtype, in an order drawn once for all."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self.n_rows = len(next(iter(rows.values())))
        order = torch.from_numpy(random_permutation(philox(EVALUATION_SEED, "live/heldout"), self.n_rows))
        self._rows = {key: values[order.to(values.device)] for key, values in rows.items()}

    def pieces(self, piece_rows: int, max_rows: int | None) -> Iterator[dict[str, Tensor]]:
        """Yield all rows, or the first ``max_rows``, in pieces; the last may be short."""
        n_rows = self.n_rows if max_rows is None else min(max_rows, self.n_rows)
        for start in range(0, n_rows, piece_rows):
            yield {key: rows[start : min(start + piece_rows, n_rows)] for key, rows in self._rows.items()}


def compute_heldout_rows(contexts: tuple[np.ndarray, np.ndarray], maker: RowMaker, n_rows: int) -> HeldoutRows:
    """Run the language model over held-out contexts, on a grid of their own, and keep ``n_rows`` rows at most."""
    tokens, documents = contexts
    pieces = []
    for start in range(0, len(tokens), maker.contexts_per_batch):
        batch = slice(start, start + maker.contexts_per_batch)
        pieces.append(maker.rows(tokens[batch], documents[batch], start).activations)
    return HeldoutRows({key: torch.cat([piece[key] for piece in pieces])[:n_rows] for key in pieces[0]})
