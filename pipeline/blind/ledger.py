"""A file of what happened, in order: one JSON object per line, each with the hash of the one before.

Lines are only ever added. Whoever changes, removes or inserts one breaks every hash after it, and opening says where.
(Somebody who rewrites the whole file is stopped by nothing; a hash written down elsewhere shows it.)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tailrace.storage.artifact import is_disk_refusal, make_directory, storage_refused
from tailrace.storage.draft import NO_LOCKS, unlockable
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.storage.formats import refuse_newer
from tailrace.storage.parsing import parse_json, read_regular

KIND = "blind-study"
"""What a ledger is the record of; its first entry says in which format, if not the first."""
BEGINNING = "0" * 64
"""What the first entry has for the hash of the one before."""

Entry = dict[str, Any]
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class Ledger:
    """The entries of one file."""

    def __init__(self, path: Path, clock: Clock = utc_now) -> None:
        self.path = path
        self._clock = clock

    def entries(self) -> list[Entry]:
        """Return all entries. Raises ArtifactMissing, or ArtifactCorrupt naming the first line that does not follow.

        Raises ArtifactMismatch for a ledger that a newer version began.

        A last line without an end is one that was being written when the process was killed: it never happened.
        """
        try:
            text = read_regular(self.path)
        except FileNotFoundError as error:
            raise _missing(self.path) from error
        except ValueError as error:
            raise ArtifactCorrupt(f"{self.path}: {error}; restore it") from error
        return _read(self.path, text)

    def append(
        self,
        event: str,
        check: Callable[[list[Entry]], dict[str, Any] | None] = lambda _: None,
        *,
        begins: bool = False,
        **facts: Any,
    ) -> Entry:
        """Add an entry with the time, on disk when this returns; return it.

        ``check`` is given what is there already while no other process can add to it, and may raise, or return more
        facts. The file is made by the entry that ``begins`` it only. Raises ArtifactMissing without one, StorageFull if
        the disk refuses.
        """
        if begins:
            make_directory(self.path.parent)
        elif not self.path.exists():
            raise _missing(self.path)
        try:
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                text = file.read()
                entries = _read(self.path, text)
                found = check(entries) or {}
                entry = self._entry(entries, event, {**facts, **found})
                file.truncate(text.rfind(b"\n") + 1)
                file.write(_line(entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise unlockable(error, self.path.parent) from error
            if is_disk_refusal(error):
                raise storage_refused(error, self.path) from error
            raise
        return entry

    def _entry(self, entries: list[Entry], event: str, facts: dict[str, Any]) -> Entry:
        previous = entries[-1]["hash"] if entries else BEGINNING
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        content = {"n": len(entries), "time": time, "event": event, **facts, "previous": previous}
        return {**content, "hash": _hash(content)}


def _missing(path: Path) -> ArtifactMissing:
    return ArtifactMissing(f"{path}: is not a study; `pipeline blind study begin` starts one")


def _read(path: Path, text: bytes) -> list[Entry]:
    entries: list[Entry] = []
    previous = BEGINNING
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            entry = parse_json(line)
            content = {key: value for key, value in entry.items() if key != "hash"}
            follows = entry["hash"] == _hash(content) and entry["previous"] == previous and entry["n"] == number - 1
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactCorrupt(f"{path}: line {number} is no entry ({error}); restore the file") from error
        if not follows:
            raise ArtifactCorrupt(
                f"{path}: line {number} does not follow from the ones before it: an entry was changed, removed or "
                "inserted; restore the file"
            )
        previous = entry["hash"]
        entries.append(entry)
    if entries:
        refuse_newer(path.parent, KIND, entries[0])
    return entries


def _line(entry: Entry) -> bytes:
    return json.dumps(entry, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _hash(content: Entry) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()).hexdigest()
