"""Look up what was written at positions of contexts, reading each context once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.harvest.rows import TokenOrderSplit


def tokens_of(split: TokenOrderSplit, contexts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return (n, context_length) the token ids of contexts, which may repeat."""
    distinct, place = np.unique(contexts, return_inverse=True)
    return split.context_tokens(distinct)[place]


def tokens_at(split: TokenOrderSplit, contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return (n,) the token id at each position."""
    distinct, place = np.unique(contexts, return_inverse=True)
    return split.context_tokens(distinct)[place, positions]


def documents_at(
    split: TokenOrderSplit, contexts: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Return (n,) the id of the document that the token at each position comes from."""
    distinct, place = np.unique(contexts, return_inverse=True)
    return split.context_documents(distinct)[place, positions]
