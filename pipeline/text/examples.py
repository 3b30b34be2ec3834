"""The values of one dataset column, read on after transient failures.

After a failure the dataset is wound back to the last mark and the values taken since are read again: the position
that ``datasets`` reports in the middle of a failed read is not relied on.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tailrace.pipeline.text.files import TextFiles
from tailrace.pipeline.text.retry import HTTP_ERROR, READ_DELAYS_SECONDS, is_transient
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

logger = logging.getLogger(__name__)

UNREADABLE = (ValueError, EOFError, zlib.error, LZMAError, pa.ArrowException, NotImplementedError)
"""What reading a damaged or foreign file raises, beside OSError."""

END = object()
"""Returned instead of a value at the end of the dataset."""


class ExampleStream(Protocol):
    """What is used of ``datasets.IterableDataset``."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last example."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration start at a position."""
        ...


class TextExamples:
    """One column of a streaming dataset. There is one position in it, set by ``rewind``."""

    def __init__(
        self, name: str, examples: ExampleStream, column: str, files: TextFiles | None, sleep: Callable[[float], None]
    ) -> None:
        self.name = name
        self.column = column
        self.files = files
        self._examples = examples
        self._sleep = sleep
        # A state once loaded stays loaded in `datasets`, so going back to the start needs a state of its own.
        self._beginning: JSON = examples.state_dict()
        self.rewind(None, 0)

    def rewind(self, state: JSON | None, index: int) -> None:
        """Go to ``state`` (the start if None), where the document numbered ``index`` lies."""
        self._mark = self._beginning if state is None else state
        self._mark_index = index
        self._taken = 0
        self._iterator: Iterator[dict[str, Any]] | None = None

    def mark(self) -> JSON:
        """Return the state after the last value, and wind back no further than this from now on."""
        self._mark = self._examples.state_dict()
        self._mark_index += self._taken
        self._taken = 0
        return self._mark

    def next_value(self) -> Any:
        """Return the next value of the column, or ``END``.

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

    def _read(self) -> Any:
        if self._iterator is None:
            self._examples.load_state_dict(self._mark)
            iterator = iter(self._examples)
            for _ in range(self._taken):
                next(iterator, None)
            self._iterator = iterator
        example = next(self._iterator, None)
        if example is None:
            return END
        self._taken += 1
        return example[self.column]

    def _unreadable(self, error: BaseException) -> TextError:
        path = self._current_file()
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

    def _current_file(self) -> Path | None:
        """Return the file being read, known because each local file is one shard."""
        state = self._examples.state_dict()
        while "shard_idx" not in state and "examples_iterable" in state:
            state = state["examples_iterable"]
        shard: int | None = state.get("shard_idx")
        if self.files is None or shard is None or shard >= len(self.files.paths):
            return None
        return self.files.paths[shard]


def describe_failure(error: BaseException) -> str:
    """Return an error's own words on one line, shortened; its class where it has none."""
    words = re.sub(r"\s+", " ", str(error)).strip()
    return words[:400] or type(error).__name__
