"""Documents held in memory, and the check that a context source resumes exactly at every state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import ContextSource, PackedContexts
from tailrace.pipeline.text.stream import Document

BOS, EOS = 99, 98


class ListReader:
    def __init__(self, documents: Sequence[Document], position: int) -> None:
        self.documents = documents
        self.position = position

    @property
    def state(self):
        return {"position": self.position}

    def upcoming_indices(self, n: int) -> list[int]:
        return [document.index for document in self.documents[self.position : self.position + n]]

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        if self.position == len(self.documents):
            raise StopIteration
        self.position += 1
        return self.documents[self.position - 1]


class TokenDocuments:
    """Pre-tokenised documents; ``order`` is the order in which they are read."""

    kind = "tokens"
    kept = ("name",)

    def __init__(self, documents: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> None:
        indices = range(len(documents)) if order is None else order
        self.documents = [
            Document(index, None, list(documents[index]), kept={"name": f"document {index}"}) for index in indices
        ]
        self.n_opened = 0

    def read_from(self, state) -> ListReader:
        self.n_opened += 1
        return ListReader(self.documents, 0 if state is None else state["position"])


def every_row(tokens: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    return np.ones(tokens.shape, dtype=bool)


def all_but_bos(tokens: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(tokens.shape, dtype=bool)
    mask[:, 0] = False
    return mask


def refuse_text(texts: list[str]) -> list[list[int]]:
    raise AssertionError("there is no text to tokenise")


def make_source(documents, *, context_length=4, holdout="0", targets=None, state=None, seed=0, **options):
    if not hasattr(documents, "read_from"):
        documents = TokenDocuments(documents)
    return ContextSource(
        documents,
        options.pop("tokenize", refuse_text),
        context_length=context_length,
        bos_token_id=BOS,
        separator_token_id=EOS,
        holdout=holdout if isinstance(holdout, HoldoutRule) else HoldoutRule.parse(holdout, seed),
        row_mask=options.pop("row_mask", every_row),
        targets=targets or {"train": None},
        state=state,
        **options,
    )


def contexts_of(items: Sequence[PackedContexts], split: str = "train") -> list[list[int]]:
    return [row for item in items if item.split == split for row in item.tokens.tolist()]


def documents_of(items: Sequence[PackedContexts], split: str = "train") -> list[list[int]]:
    return [row for item in items if item.split == split for row in item.documents.tolist()]


def as_json(value):
    return json.loads(json.dumps(value))


def plain(items: Sequence[PackedContexts]) -> list:
    return [(item.split, item.tokens.tolist(), item.documents.tolist()) for item in items]


def assert_resumes_everywhere(make: Callable[[object], ContextSource]) -> None:
    """Take the state before the first and after every item, restart from each, and compare all that follows."""
    source = make(None)
    states, items, kept = [as_json(source.state)], [], [source.take_kept()]
    for item in source:
        items.append(item)
        states.append(as_json(source.state))
        kept.append(source.take_kept())
    states.append(as_json(source.state))  # after the end, when no further item follows
    kept.append(source.take_kept())
    final_counts, finished = source.counts, source.finished
    for n, state in enumerate(states):
        resumed = make(state)
        assert plain(list(resumed)) == plain(items[n:]), f"after item {n}"
        assert resumed.take_kept() == _joined(kept[n + 1 :]), f"after item {n}"
        assert resumed.counts == final_counts, f"after item {n}"
        assert resumed.finished == finished


def _joined(pieces: Sequence[dict[str, list]]) -> dict[str, list]:
    """Return the lists of each split, one after the other."""
    splits = dict.fromkeys(split for piece in pieces for split in piece)
    return {split: [item for piece in pieces for item in piece.get(split, [])] for split in splits}


def stream_tokens(documents: Sequence[Sequence[int]], indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (document, token) pairs that packing must carry for these documents, in this order."""
    return [(index, token) for index in indices if documents[index] for token in [*documents[index], EOS]]


def packed_tokens(items: Sequence[PackedContexts], split: str, partial=None) -> list[tuple[int, int]]:
    """Return the (document, token) pairs of all contexts without their BOS, and of a partial context after them."""
    pairs = [
        (int(document), int(token))
        for item in items
        if item.split == split
        for document, token in zip(item.documents[:, 1:].ravel(), item.tokens[:, 1:].ravel(), strict=True)
    ]
    return pairs + (list(zip(partial["documents"], partial["tokens"], strict=True)) if partial else [])
