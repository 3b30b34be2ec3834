"""Rows of local JSON files, read with Python's own reader: each value has the type that it has in the file.

Readers that infer a schema for a chunk of a file cast what differs from it: a number among the texts makes them spell
all texts of its chunk anew, and a column that nobody reads can end the reading. Here a row stands for itself, and
only the asked column is looked at.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tailrace.pipeline.text.columns import BadRow, Row
from tailrace.pipeline.text.files import TextFiles, offer_zstandard
from tailrace.storage.artifact import JSON

_READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonExamples:
    """The rows of JSON files (lines, or one list per file), with the position that ``datasets`` streams have.

    A state is a file and a row of it. ``rows_before`` goes to a row counted from the first file, for older states.
    """

    features = None

    def __init__(self, files: TextFiles, columns: list[str] | None = None) -> None:
        self.line = ""
        """The row and line of the last row."""
        self._files = files
        self._columns = columns
        self._file = 0
        self._row = 0

    def select_columns(self, columns: list[str]) -> JsonExamples:
        """Return the same rows with these columns only; a row without one keeps lacking it."""
        return JsonExamples(self._files, columns)

    def take(self, n: int) -> Iterator[Row]:
        """Return the first rows, without a position."""
        return islice(iter(JsonExamples(self._files, self._columns)), n)

    def state_dict(self) -> dict[str, JSON]:
        """Return the position after the last row."""
        return {"shard_idx": self._file, "shard_example_idx": self._row}

    def load_state_dict(self, state: JSON) -> None:
        """Go to a position that ``state_dict`` returned."""
        self._file, self._row = state["shard_idx"], state["shard_example_idx"]

    def rows_before(self, n: int) -> dict[str, JSON]:
        """Return the position of the row that has ``n`` rows before it, over all files."""
        for number, path in enumerate(self._files.paths):
            n_rows = sum(1 for _ in _read_rows(path, 1 << 62)) if n else 0
            if n_rows >= n:
                return {"shard_idx": number, "shard_example_idx": n}
            n -= n_rows
        return {"shard_idx": len(self._files.paths), "shard_example_idx": 0}

    def __iter__(self) -> Iterator[Row]:
        while self._file < len(self._files.paths):
            path = self._files.paths[self._file]
            for value, line in islice(_read_rows(path, self._row), self._row, None):
                self._row += 1
                self.line = f"row {self._row}" + (f" (line {line})" if line else "")
                yield self._select(value)
            self._file, self._row = self._file + 1, 0

    def _select(self, value: Any) -> Row:
        if isinstance(value, BadRow):
            return value
        row = value if isinstance(value, dict) else {"text": value}
        return row if self._columns is None else {name: row[name] for name in self._columns if name in row}


def _read_rows(path: Path, n_unparsed: int) -> Iterator[tuple[Any, int | None]]:
    """Yield each value and its line; the first ``n_unparsed`` of a file of lines are only counted (None).

    A line that is no JSON is a ``BadRow``; of a list, everything after an error is unreadable, so it is raised.
    """
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    offer_zstandard()
    with open(path, "rb") as raw, compr[infer_compression(path.name)](raw, mode="rb") as plain:
        buffered = io.BufferedReader(plain)
        if buffered.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from ((value, None) for value in _read_list(buffered))
            return
        row = 0
        for number, line in enumerate(buffered, start=1):
            stripped = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if stripped:
                yield (_parse(stripped) if row >= n_unparsed else None), number
                row += 1


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadRow(f"cannot be read as JSON ({error})")


def _read_list(file: IO[bytes]) -> Iterator[Any]:
    """Yield the items of one JSON list without reading the list as one value."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder().raw_decode
    text, before, n_items = "", 0, 0
    while True:
        try:
            opening = _after_space(text, before)  # of the list, or the comma before an item
            start = _after_space(text, opening + 1)
            if not n_items and text[start : start + 1] == "]":
                closing = start
                break
            value, end = parse(text, start)
            closing = _after_space(text, end)
            if text[closing : closing + 1] not in (",", "]"):  # perhaps the rest of a number is still to be read
                raise ValueError(
                    f"a list item is followed by {text[closing : closing + 20]!r}; wanted a comma or the list's end"
                )
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        except ValueError:
            more = file.read(max(_READ_BYTES, len(text) - before))
            text, before = text[before:] + decode(more, not more), 0
            if not more:
                raise
            continue
        n_items += 1
        yield value
        if text[closing] == "]":
            break
        before = closing
    _check_end(text[closing + 1 :] + decode(file.read(), True))


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None, "no space is a match too"
    return match.end()


def _check_end(rest: str) -> None:
    if rest.strip():
        raise ValueError(f"the list is followed by {rest.strip()[:20]!r}; wanted the file's end")
