"""The order of documents: shuffled in windows, resumable, every document known by its index in the dataset.

A document keeps its index in the dataset's own order, also when it is read in another order, so that anybody can look
it up in the source. That is why the shuffle is done here and not with ``IterableDataset.shuffle``: that one reorders
shards and draws from a moving buffer, which hides the index, and refills the buffer with other documents on resuming.
Here the stream is cut into windows, and window w is permuted by (seed, w) alone: the state is where window w began
and how many of its documents were taken. Resuming reads at most one window again; ``datasets`` finds its beginning by
skipping through one file in Arrow, without making Python values of it.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from lzma import LZMAError
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tailrace.pipeline.text.columns import (
    BadRow,
    Column,
    Conversation,
    Kept,
    Kind,
    Message,
    Row,
    read_kept,
    read_row,
)
from tailrace.pipeline.text.files import TextFiles, describe_text_files
from tailrace.pipeline.text.json_rows import JsonExamples
from tailrace.pipeline.text.settings import MIN_WINDOW
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError
from tailrace.storage.shuffle import philox, random_permutation

logger = logging.getLogger(__name__)

UNSHUFFLED_BLOCK = 256
"""Documents read at a time when they are not shuffled; bounds what resuming reads again."""

WINDOW_CHARACTERS = 1 << 28
"""A window ends early once its documents hold this many characters, so that a window of books fits in memory."""

_TOKEN_WEIGHT = 32
"""Characters that weigh as much as one token id, which is a Python integer in a list."""


UNREADABLE = (ValueError, OverflowError, EOFError, zlib.error, LZMAError, pa.ArrowException, NotImplementedError)
"""What reading a damaged or foreign file raises, beside OSError."""

# The HTTP library below huggingface_hub has changed twice; its root error is always the first base of the hub's own.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]

_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    gzip.BadGzipFile,
    OfflineModeIsEnabled,
)
_RETRIED_STATUS = (408, 429)

READ_DELAYS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits between attempts to go on reading a stream that already worked."""

OPEN_DELAYS_SECONDS = (1.0, 2.0)
"""Waits between attempts to open a dataset: shorter, since the usual cause is a machine without a network."""

Result = TypeVar("Result")


class Document(NamedTuple):
    """One document: its index in the dataset's own order, and its text, token ids or messages, or why it has none."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which no document needs
    text: str | None
    tokens: list[int] | None
    problem: str | None = None
    """File, row and reason of a bad row that is passed over."""
    messages: list[Message] | None = None
    kept: Kept = {}  # noqa: RUF012 - never changed
    """What its row says in the columns that are kept."""

    @property
    def weight(self) -> int:
        """Memory it takes, counted in characters."""
        said = sum(len(message["content"] or "") for message in self.messages or ())
        return len(self.text or "") + said + _TOKEN_WEIGHT * len(self.tokens or ())


class DocumentStream:
    """The documents of one dataset in shuffled order; ``read_from`` gives an iterator."""

    def __init__(
        self,
        examples: TextExamples,
        column: Column,
        source: dict[str, JSON],
        *,
        shuffle_window: int,
        seed: int,
        first_rows: Sequence[Row] = (),
        kept: tuple[str, ...] = (),
        skips_bad_rows: bool = False,
    ) -> None:
        self.examples = examples
        self.column = column
        self.first_rows = first_rows
        """The rows that a dataset of token ids begins with, and the text beside them."""
        self.kept = kept
        """Columns of which documents bring along what their row says."""
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.skips_bad_rows = skips_bad_rows
        self.has_skipped = False
        """Whether the user was warned of a bad row."""
        self.newest_reader: DocumentReader | None = None
        self._source = source

    @property
    def name(self) -> str:
        """The dataset as the user named it."""
        return self.examples.name

    @property
    def kind(self) -> Kind:
        """Whether documents are texts, token ids or conversations."""
        return self.column.kind

    def honour(self, masks: tuple[str, ...]) -> None:
        """Let these columns say which token ids are text, and no others."""
        self.column = self.column._replace(masks=masks)

    def identity(self) -> dict[str, JSON]:
        """Return everything that decides which documents come in which order, for local files with their checksums."""
        files = self.examples.files
        listed = {} if files is None else {"files": describe_text_files(files)}
        column = {"column": self.column.name, "kind": self.kind}
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
        """Where the next document lies: where its window begins, the window's number, its index in it."""
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
            documents = [documents[i] for i in random_permutation(bits, len(documents))]
        self._window = documents

    def _read_window(self) -> list[Document]:
        limit = self._stream.shuffle_window or UNSHUFFLED_BLOCK
        documents: list[Document] = []
        weight = 0
        while len(documents) < limit and (weight < WINDOW_CHARACTERS or len(documents) < MIN_WINDOW):
            row = self._stream.examples.next_row()
            if row is None:
                break
            documents.append(self._make_document(self._first_index + len(documents), row))
            weight += documents[-1].weight
        return documents

    def _leave_window(self) -> None:
        self._window_start = self._stream.examples.mark()
        self._first_index += len(self._window)
        self._window_number += 1
        self._position = 0
        self._window = []

    def _make_document(self, index: int, row: Row) -> Document:
        value = read_row(row, self._stream.column)
        kept = read_kept(row, self._stream.kept)
        if isinstance(kept, BadRow):
            value = kept if not isinstance(value, BadRow) else value
        elif isinstance(value, str):
            return Document(index, value, None, kept=kept)
        elif isinstance(value, list):
            return Document(index, None, value, kept=kept)
        elif isinstance(value, Conversation):
            return Document(index, None, None, messages=value.messages, kept=kept)
        assert isinstance(value, BadRow), "every other row was read"
        examples = self._stream.examples
        if self._stream.skips_bad_rows:
            if not self._stream.has_skipped:
                logger.warning("%s: document %d %s; such rows are passed over", examples.locate(), index, value.reason)
            self._stream.has_skipped = True
            return Document(index, None, None, f"{examples.locate(recorded=True)}: {value.reason}")
        raise refuse_row(examples.locate(), index, value)


def refuse_row(where: str, index: int, bad: BadRow) -> TextError:
    """Return the error for a row that is no document."""
    return TextError(
        f"{where}: document {index} {bad.reason}. Repair or remove that row, pass --column to read another column, or "
        "pass over such rows with --on-bad-row skip"
    )


def empty_dataset(name: str) -> TextError:
    """Return the error for a dataset without a single document."""
    return TextError(f"{name}: holds no document; check the path, the split or the pattern")


class TextExamples:
    """Rows of a streaming dataset. There is one position in it, set by ``rewind``."""

    def __init__(self, name: str, examples: Any, files: TextFiles | None, sleep: Callable[[float], None]) -> None:
        self.name = name
        self.files = files
        self._examples = examples  # a streaming dataset of `datasets`
        self._sleep = sleep
        # A state once loaded stays loaded in `datasets`, so going back to the start needs a state of its own.
        self._beginning: JSON = examples.state_dict()
        self.rewind(None, 0)

    def rewind(self, state: JSON | None, index: int) -> None:
        """Go to ``state`` (the start if None), where the document numbered ``index`` lies."""
        self._mark = self._beginning if state is None else state
        if "shard_idx" not in self._mark and isinstance(self._examples, JsonExamples):
            self._mark = self._examples.rows_before(index)  # a state that `datasets` wrote in an older cache
        self._mark_index = index
        self._taken = 0
        self._iterator: Iterator[Row] | None = None

    def mark(self) -> JSON:
        """Return the state after the last row, and wind back no further than this from now on."""
        self._mark = self._examples.state_dict()
        self._mark_index += self._taken
        self._taken = 0
        return self._mark

    def next_row(self) -> Row | None:
        """Return the next row, or None at the end of the dataset.

        Raises TextError for a damaged file, or when the stream keeps failing.
        """
        for delay in (*READ_DELAYS_SECONDS, None):
            try:
                return self._read()
            except (OSError, HTTP_ERROR) as error:
                self._iterator = None
                if not is_transient(error, remote=self.files is None):
                    raise self._unreadable(error) from error
                if delay is None:
                    raise self._lost(error) from error
                logger.warning("%s: %s; trying again in %g s", self.name, describe_failure(error), delay)
                self._sleep(delay)
            except UNREADABLE as error:
                raise self._unreadable(error) from error
        raise AssertionError("the last attempt either returns or raises")

    def _read(self) -> Row | None:
        if self._iterator is None:
            self._examples.load_state_dict(self._mark)
            iterator = iter(self._examples)
            for _ in range(self._taken):
                next(iterator, None)
            self._iterator = iterator
        row = next(self._iterator, None)
        if row is not None:
            self._taken += 1
        return row

    def locate(self, *, recorded: bool = False) -> str:
        """Return file, row and line of the last row, as far as they are known.

        ``recorded``: the file by the name that it is recorded under, else by its path.
        """
        number = self._current_shard()
        if self.files is None or number is None:
            return self.name
        file = self.files.names[number] if recorded else str(self.files.paths[number])
        return f"{file}, {self._examples.line}" if isinstance(self._examples, JsonExamples) else file

    def _unreadable(self, error: BaseException) -> TextError:
        number = self._current_shard()
        path = None if self.files is None or number is None else self.files.paths[number]
        return TextError(
            f"{path or self.name}: cannot be read at document {self._mark_index + self._taken} of the dataset "
            f"({describe_failure(error)}). Repair the {'file' if path else 'dataset'} or leave it out"
        )

    def _lost(self, error: BaseException) -> TextError:
        return TextError(
            f"{self.name}: reading failed {len(READ_DELAYS_SECONDS) + 1} times at document "
            f"{self._mark_index + self._taken} of the dataset ({describe_failure(error)}). Everything finished so far "
            "is kept: run the same command again to continue"
        )

    def _current_shard(self) -> int | None:
        """Return the number of the file being read, known because each local file is one shard."""
        state = self._examples.state_dict()
        while "shard_idx" not in state and "examples_iterable" in state:
            state = state["examples_iterable"]
        shard: int | None = state.get("shard_idx")
        return None if self.files is None or shard is None or shard >= len(self.files.paths) else shard


def describe_failure(error: BaseException) -> str:
    """Return an error's own words on one line, shortened; its class where it has none."""
    words = re.sub(r"\s+", " ", str(error)).strip()
    return words[:400] or type(error).__name__


def is_transient(error: BaseException, *, remote: bool) -> bool:
    """Tell whether the same read may succeed later.

    pyarrow reports corrupt bytes as a plain OSError without an error number; in a local file they will stay corrupt,
    while over a network they may have been a torn transfer.
    """
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status >= 500 or status in _RETRIED_STATUS
    if isinstance(error, OSError):
        return remote or type(error) is not OSError or error.errno is not None
    return isinstance(error, HTTP_ERROR)


def retry_opening(action: Callable[[], Result], sleep: Callable[[float], None]) -> Result:
    """Return what ``action`` returns, waiting and trying again after transient failures; the last one is raised."""
    for delay in OPEN_DELAYS_SECONDS:
        try:
            return action()
        except (OSError, HTTP_ERROR) as error:
            if not is_transient(error, remote=True):
                raise
            sleep(delay)
    return action()
