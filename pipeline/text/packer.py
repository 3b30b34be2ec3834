"""Documents into contexts of one length, without losing or doubling a token.

A context is BOS and then T − 1 tokens of the stream doc₁ SEP doc₂ SEP …; it is finished as soon as it is full, and
what is left over waits for the next documents. A document without tokens leaves no separator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

_LARGEST_TOKEN_ID = int(np.iinfo(np.int32).max)


class DocumentTokens(NamedTuple):
    """One document's index and its token ids, int32."""

    document: int
    tokens: np.ndarray

    @property
    def n_stream_tokens(self) -> int:
        """Tokens it adds to the stream: its own and a separator; none if it is empty."""
        return len(self.tokens) + 1 if len(self.tokens) else 0


class Contexts(NamedTuple):
    """Packed token ids (contexts, T) int32, and the index of each token's document, uint32."""

    tokens: np.ndarray
    documents: np.ndarray


class Partial(NamedTuple):
    """The tokens that wait for their context to be full, without its BOS, and the document of each."""

    tokens: np.ndarray
    documents: np.ndarray

    @classmethod
    def from_json(cls, value: JSON) -> Partial:
        """Return the partial context that ``to_json`` described."""
        return cls(np.array(value["tokens"], dtype=np.int32), np.array(value["documents"], dtype=np.uint32))

    def to_json(self) -> dict[str, JSON]:
        """Return it as lists."""
        return {"tokens": self.tokens.tolist(), "documents": self.documents.tolist()}


NOTHING = Partial(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint32))


@dataclass(frozen=True)
class Packer:
    """The packing rule: contexts of ``context_length`` tokens, what begins them, and what ends a document."""

    context_length: int
    bos_token_id: int
    separator_token_id: int

    def add(self, partial: Partial, documents: Sequence[DocumentTokens]) -> tuple[Contexts, Partial]:
        """Append documents to the stream; return the contexts that are full now, and what is left over.

        A separator belongs to the document it ends, a BOS to the document of the token after it.
        """
        tokens, origins = self._extend_stream(partial, documents)
        n_contexts, n_left = divmod(len(tokens), self.context_length - 1)
        n_packed = len(tokens) - n_left
        packed = Contexts(
            np.full((n_contexts, self.context_length), self.bos_token_id, dtype=np.int32),
            np.empty((n_contexts, self.context_length), dtype=np.uint32),
        )
        packed.tokens[:, 1:] = tokens[:n_packed].reshape(n_contexts, self.context_length - 1)
        packed.documents[:, 1:] = origins[:n_packed].reshape(n_contexts, self.context_length - 1)
        packed.documents[:, 0] = packed.documents[:, 1]
        # Copies, so that a short rest does not keep a long document in memory.
        return packed, Partial(tokens[n_packed:].copy(), origins[n_packed:].copy())

    def _extend_stream(self, partial: Partial, documents: Sequence[DocumentTokens]) -> tuple[np.ndarray, np.ndarray]:
        separator = np.array([self.separator_token_id], dtype=np.int32)
        pieces = [partial.tokens]
        for document in documents:
            if len(document.tokens):
                pieces += [document.tokens, separator]
        lengths = [document.n_stream_tokens for document in documents]
        indices = np.array([document.document for document in documents], dtype=np.uint32)
        return np.concatenate(pieces), np.concatenate([partial.documents, np.repeat(indices, lengths)])

    def strip_boundaries(self, tokens: np.ndarray) -> np.ndarray:
        """Return pre-tokenised ``tokens`` without one leading BOS and one trailing separator: packing adds its own.

        Where BOS and separator are one token, a document that is that token alone is empty.
        """
        start = int(len(tokens) > 0 and tokens[0] == self.bos_token_id)
        stop = len(tokens) - int(len(tokens) > start and tokens[-1] == self.separator_token_id)
        return tokens[start:stop]


def check_token_ids(document: int, tokens: Sequence[int], vocabulary_size: int | None) -> np.ndarray:
    """Return the token ids of a pre-tokenised document as int32.

    Raises TextError for ids that are negative or not in the model's vocabulary.
    """
    limit = _LARGEST_TOKEN_ID + 1 if vocabulary_size is None else vocabulary_size
    if tokens and (min(tokens) < 0 or max(tokens) >= limit):
        wrong = next(token for token in tokens if not 0 <= token < limit)
        raise TextError(
            f"document {document}: holds token id {wrong}, but the model's ids are 0 to {limit - 1}; the dataset was "
            "tokenised for another model: choose one made for this model, or pass --column to read its text instead"
        )
    return np.array(tokens, dtype=np.int32)
