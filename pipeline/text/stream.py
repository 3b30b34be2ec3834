"""The order of documents: shuffled in windows, resumable, every document known by its index in the dataset.

A document keeps its index in the dataset's own order, also when it is read in another order, so that anybody can look
it up in the source. That is why the shuffle is done here and not with ``IterableDataset.shuffle``: that one reorders
shards and draws from a moving buffer, which hides the index, and refills the buffer with other documents on resuming.
Here the stream is cut into windows, and window w is permuted by (seed, w) alone: the state is where window w began
and how many of its documents were taken. Resuming reads at most one window again; ``datasets`` finds its beginning by
skipping through one file in Arrow, without making Python values of it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from tailrace.pipeline.text.examples import END, TextExamples
from tailrace.pipeline.text.files import describe_text_files
from tailrace.pipeline.text.settings import MIN_WINDOW
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError
from tailrace.storage.randomness import philox, random_permutation

UNSHUFFLED_BLOCK = 256
"""Documents read at a time when they are not shuffled; bounds what resuming reads again."""

WINDOW_CHARACTERS = 1 << 28
"""A window ends early once its documents hold this many characters, so that a window of books fits in memory."""

_TOKEN_WEIGHT = 32
"""Characters that weigh as much as one token id, which is a Python integer in a list."""


class Document(NamedTuple):
    """One document: its index in the dataset's own order, and either its text or its token ids."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which no document needs
    text: str | None
    tokens: list[int] | None

    @property
    def weight(self) -> int:
        """Memory it takes, counted in characters."""
        return len(self.text or "") + _TOKEN_WEIGHT * len(self.tokens or ())


class DocumentStream:
    """The documents of one dataset in shuffled order; ``read_from`` gives an iterator."""

    def __init__(
        self,
        examples: TextExamples,
        kind: Literal["text", "tokens"],
        source: dict[str, JSON],
        *,
        shuffle_window: int,
        seed: int,
    ) -> None:
        self.examples = examples
        self.kind = kind
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.newest_reader: DocumentReader | None = None
        self._source = source

    @property
    def name(self) -> str:
        """The dataset as the user named it."""
        return self.examples.name

    def identity(self) -> dict[str, JSON]:
        """Return everything that decides which documents come in which order, for local files with their checksums."""
        files = self.examples.files
        listed = {} if files is None else {"files": describe_text_files(files)}
        column = {"column": self.examples.column, "kind": self.kind}
        return {**self._source, **listed, **column, "shuffle_window": self.shuffle_window, "seed": self.seed}

    def read_from(self, state: JSON | None = None) -> DocumentReader:
        """Return an iterator of documents that begins at ``state`` (a reader's ``state``; the start if None).

        Only the newest reader of a stream may be used, since ``datasets`` keeps one position per dataset.
        """
        self.newest_reader = DocumentReader(self, state)
        return self.newest_reader

    def __iter__(self) -> DocumentReader:
        return self.read_from(None)


class DocumentReader:
    """An iterator of documents. ``state`` is JSON, names the next document, and can be read at any time."""

    def __init__(self, stream: DocumentStream, state: JSON | None) -> None:
        start = state or {"examples": None, "window": 0, "first_index": 0, "position": 0}
        self._stream = stream
        self._window_start: JSON = start["examples"]
        self._window_number: int = start["window"]
        self._first_index: int = start["first_index"]
        self._position: int = start["position"]
        self._window: list[Document] = []
        stream.examples.rewind(self._window_start, self._first_index)

    @property
    def state(self) -> dict[str, JSON]:
        """Where the next document lies: where its window begins in the dataset, the window's number, its place."""
        return {
            "examples": self._window_start,
            "window": self._window_number,
            "first_index": self._first_index,
            "position": self._position,
        }

    def upcoming_indices(self, n: int) -> list[int]:
        """Return the indices of the next documents without taking them: up to ``n`` of the current window.

        A window's first ``MIN_WINDOW`` are always there, unless the dataset ends.
        """
        self._fill()
        return [document.index for document in self._window[self._position : self._position + n]]

    def __iter__(self) -> DocumentReader:
        return self

    def __next__(self) -> Document:
        if not self._window:
            self._fill()
            if not self._window:
                raise StopIteration
        document = self._window[self._position]
        self._position += 1
        if self._position == len(self._window):
            self._leave_window()
        return document

    def _fill(self) -> None:
        assert self._stream.newest_reader is self, "another reader of this stream was opened"
        if self._window:
            return
        documents = self._read_window()
        if not documents and self._first_index == 0:
            raise empty_dataset(self._stream.name)
        if self._stream.shuffle_window:
            bits = philox(self._stream.seed, "document order", self._window_number)
            documents = [documents[place] for place in random_permutation(bits, len(documents))]
        self._window = documents

    def _read_window(self) -> list[Document]:
        limit = self._stream.shuffle_window or UNSHUFFLED_BLOCK
        documents: list[Document] = []
        weight = 0
        while len(documents) < limit and (weight < WINDOW_CHARACTERS or len(documents) < MIN_WINDOW):
            value = self._stream.examples.next_value()
            if value is END:
                break
            documents.append(self._make_document(self._first_index + len(documents), value))
            weight += documents[-1].weight
        return documents

    def _leave_window(self) -> None:
        self._window_start = self._stream.examples.mark()
        self._first_index += len(self._window)
        self._window_number += 1
        self._position = 0
        self._window = []

    def _make_document(self, index: int, value: object) -> Document:
        if self._stream.kind == "text" and isinstance(value, str):
            return Document(index, value, None)
        if self._stream.kind == "tokens" and isinstance(value, list) and all(type(token) is int for token in value):
            return Document(index, None, value)
        wanted = "text" if self._stream.kind == "text" else "a list of whole numbers"
        raise TextError(
            f"{self._stream.name}: document {index} holds {_show(value)} in column {self._stream.examples.column!r}, "
            f"wanted {wanted}; repair or remove that row, or pass --column to read another"
        )


def empty_dataset(name: str) -> TextError:
    """Return the error for a dataset without a single document."""
    return TextError(f"{name}: holds no document; check the path, the split or the pattern")


def _show(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list):
        wrong = next(item for item in value if type(item) is not int)
        return f"a list with {wrong!r:.60}"
    return f"{value!r:.60}"
