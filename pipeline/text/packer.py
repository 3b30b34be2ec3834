"""The packing rule: documents as one stream of tokens, cut into contexts of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tailrace.pipeline.text.reading import FIRST_RELEASE, Reading
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError
from tailrace.storage.formats import LEFT_OUT

_LARGEST_TOKEN_ID = int(np.iinfo(np.int32).max)


class DocumentTokens(NamedTuple):
    """One document's index and its token ids, int32; none for a bad row, with its file, row and reason."""

    document: int
    tokens: np.ndarray
    problem: str | None = None
    left_out: np.ndarray | None = None
    """Where rows are chosen by role: which of the tokens give none, bool."""


class Contexts(NamedTuple):
    """Packed token ids (contexts, T) int32, and each token's marked document, uint32.

    That is the document's index, with LEFT_OUT where a role keeps the token from becoming a row.
    """

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
    reading: Reading = FIRST_RELEASE

    def add(self, partial: Partial, documents: Sequence[DocumentTokens]) -> tuple[Contexts, Partial]:
        """Append documents to the stream; return the contexts that are full now, and what is left over.

        A separator belongs to the document it ends, a BOS to the document of the token after it. Where a document just
        fits, its separator would follow a BOS, which is left out where the two are one token.
        """
        tokens, indices = self._extend_stream(partial, documents)
        n_contexts, n_left = divmod(len(tokens), self.context_length - 1)
        n_packed = len(tokens) - n_left
        packed = Contexts(
            np.full((n_contexts, self.context_length), self.bos_token_id, dtype=np.int32),
            np.empty((n_contexts, self.context_length), dtype=np.uint32),
        )
        packed.tokens[:, 1:] = tokens[:n_packed].reshape(n_contexts, self.context_length - 1)
        packed.documents[:, 1:] = indices[:n_packed].reshape(n_contexts, self.context_length - 1)
        packed.documents[:, 0] = packed.documents[:, 1]
        # Copies, so that a short rest does not keep a long document in memory.
        return packed, Partial(tokens[n_packed:].copy(), indices[n_packed:].copy())

    def _extend_stream(self, partial: Partial, documents: Sequence[DocumentTokens]) -> tuple[np.ndarray, np.ndarray]:
        separator = np.array([self.separator_token_id], dtype=np.int32)
        pieces, indices, n_stream = [partial.tokens], [partial.documents], len(partial.tokens)
        for document in documents:
            own = [document.tokens] if len(document.tokens) else []
            fits = (n_stream + len(document.tokens)) % (self.context_length - 1) == 0
            if own and self.reading.token_rows == "documents" and (self.reading.separator_after_bos or not fits):
                own.append(separator)
            pieces += own
            indices.append(np.full(sum(map(len, own)), document.document, np.uint32))
            if document.left_out is not None:  # the separator is said by no role
                indices[-1][np.append(document.left_out, True)[: len(indices[-1])]] |= LEFT_OUT
            n_stream += len(indices[-1])
        return np.concatenate(pieces), np.concatenate(indices)

    def strip_boundaries(self, tokens: np.ndarray) -> np.ndarray:
        """Return pre-tokenised ``tokens`` without what packing adds: one leading BOS and one trailing separator."""
        return tokens[self.between_boundaries(tokens)]

    def between_boundaries(self, tokens: np.ndarray) -> slice:
        """Return where in ``tokens`` the text lies.

        Where BOS and separator are one token, a document that is that token alone is empty. Contexts and pieces lose
        only a BOS that all of them have: their separators are the data's own.
        """
        is_document = self.reading.token_rows == "documents"
        starts = len(tokens) > 0 and tokens[0] == self.bos_token_id
        start = int(starts and (is_document or self.reading.rows_begin_with_bos))
        ends = is_document and len(tokens) > start and tokens[-1] == self.separator_token_id
        return slice(start, len(tokens) - int(ends))

    def misfit(self, tokens: np.ndarray) -> str | None:
        """Return why a row that is to be a context of its own is none; None if it is, or need not be."""
        if self.reading.token_rows != "contexts" or not len(tokens):
            return None
        wanted = self.context_length - (not self.reading.rows_begin_with_bos)
        if len(tokens) != wanted:
            return f"has {len(tokens)} ids, wanted {wanted} as in the first rows, which are contexts"
        if self.reading.rows_begin_with_bos and tokens[0] != self.bos_token_id:
            return f"begins with id {tokens[0]}, wanted the BOS {self.bos_token_id} as in the first rows"
        return None


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
