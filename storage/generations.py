"""Generations of a cache: named, listed, pinned by who reads them, and pruned.

A reader holds a shared lock on its generation's manifest, which needs no right to write and which the kernel gives up
when the process ends. Pruning takes the same locks alone, notes in ``pruned.json`` what is given up, and then deletes.
From that note on nothing that is deleted is read, so a prune that was cut off is finished by the next.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from tailrace.storage.artifact import (
    MANIFEST,
    Record,
    canonical_json,
    read_sealed,
    seal,
    storage_refused,
    unreadable,
    write_atomically,
)
from tailrace.storage.cache_format import EPOCHS, SPLITS, CacheManifest, manifest_name, packing_name
from tailrace.storage.draft import NO_LOCKS, Lock, unlockable
from tailrace.storage.errors import ArtifactBusy, ArtifactCorrupt, ArtifactMismatch, StorageFull
from tailrace.storage.names import files_below, inside, matching, remove_temporary

PRUNED = "pruned.json"
_NUMBERED = ("commits", "documents", "statistics", "superseded")
"""Folders that have a folder for each generation."""


@dataclass(frozen=True)
class CacheAt:
    """A cache's path with the generation that is to be read of it."""

    path: Path
    generation: int

    def __str__(self) -> str:
        return f"{self.path} at generation {self.generation}"


CachePath = Path | CacheAt
"""A cache, at its newest generation if none is named."""


def refuse_generation(path: Path, number: int | None) -> None:
    """Raise ArtifactMismatch if a generation is named of what is no cache."""
    if number is not None:
        raise ArtifactMismatch(f"{path}: is no cache, so it has no generation {number}; leave --generation out")


class PruneNote(Record):
    """The note of generations that were pruned."""

    oldest: int = Field(ge=0)
    """The oldest generation that is kept."""
    train_rows: list[int]
    """Training rows of each generation before it: how many rows a cache once had decides what is asked for again."""


def read_pruned(root: Path) -> PruneNote:
    """Return what was pruned of a cache."""
    if not (root / PRUNED).exists():
        return PruneNote(oldest=0, train_rows=[])
    pruned = PruneNote.parse(canonical_json(read_sealed(inside(root, PRUNED))), root / PRUNED)
    if len(pruned.train_rows) != pruned.oldest:
        raise ArtifactCorrupt(
            f"{root / PRUNED}: has rows of {len(pruned.train_rows)} generations before generation {pruned.oldest}; "
            "restore it, or delete it if nothing was pruned"
        )
    return pruned


class Pin:
    """A shared lock on the manifest of a generation, held as long as this object or its process lives.

    On a file system without locks nothing is held: nothing can be pruned there either.
    """

    def __init__(self, manifest: Path) -> None:
        self._manifest = manifest
        self._file = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # a prune holds its own for as long as writing its note takes
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    @classmethod
    def of(cls, root: Path, generation: int) -> Pin | None:
        """Pin a generation of the cache at ``root``; None if its manifest is not there."""
        try:
            return cls(root / manifest_name(generation))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(error, root / manifest_name(generation)) from error

    def release(self) -> None:
        """Give the lock up."""
        file, self._file = self._file, _CLOSED
        if file != _CLOSED:
            os.close(file)

    def __del__(self) -> None:
        try:  # noqa: SIM105 (Python may end, and have taken the modules away)
            self.release()
        except (AttributeError, TypeError):  # it could not be opened
            pass

    def __reduce__(self) -> tuple[type[Pin], tuple[Path]]:
        return Pin, (self._manifest,)  # another process takes its own


_CLOSED = -1


class Generations:
    """The generations of a published cache that are kept, oldest first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pruned = read_pruned(root)
        newest = CacheManifest.read(root)
        older = range(self.pruned.oldest, newest.generation)
        self.manifests = [*(CacheManifest.read_file(root / manifest_name(number)) for number in older), newest]

    @property
    def numbers(self) -> list[int]:
        """Their numbers."""
        return [at.generation for at in self.manifests]

    @property
    def newest(self) -> int:
        """The newest generation."""
        return self.manifests[-1].generation

    def since(self, number: int) -> float:
        """Return when a generation was published, in seconds since 1970, as far as the file system knows."""
        file = self.root / (manifest_name(number) if number < self.newest else MANIFEST)
        return file.stat().st_mtime

    @property
    def train_rows(self) -> list[int]:
        """Training rows of every generation, those that were pruned included."""
        return [*self.pruned.train_rows, *(at.splits["train"].n_rows for at in self.manifests)]

    def lines(self) -> list[str]:
        """Return a line about each."""
        return [self._line(at) for at in self.manifests]

    def _line(self, at: CacheManifest) -> str:
        rows = ", ".join(f"{at.splits[name].n_rows:,} {name} rows" for name in SPLITS if name in at.splits)
        sites = ", ".join(site.name for site in at.format.sites)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since(at.generation)))
        newest = ", the newest" if at.generation == self.newest else ""
        return f"generation {at.generation}: {rows} of {sites}, since {since}{newest}"

    def bytes_freed(self, oldest: int) -> int:
        """Return the bytes that the disk gets back where ``oldest`` becomes the oldest generation."""
        return sum(file.lstat().st_size for file in self.unneeded(oldest) if file.lstat().st_nlink == 1)

    def unneeded(self, oldest: int) -> list[Path]:
        """Return the files that only generations before ``oldest`` need, their manifests last."""
        needed = {name for at in self.manifests if at.generation >= oldest for name in at.files}
        packed = [name for number in range(self.newest + 1) if (self.root / (name := packing_name(number))).exists()]
        names = [
            file.relative_to(self.root).as_posix() for folder in self._folders(oldest) for file in files_below(folder)
        ]
        names += [name for name in packed[:-1] if name in {packing_name(number) for number in range(oldest)}]
        names += [name for number in range(oldest) if (self.root / (name := manifest_name(number))).exists()]
        return [inside(self.root, name) for name in names if name not in needed]

    def _folders(self, oldest: int) -> Iterator[Path]:
        """Yield the folders that hold nothing of ``oldest`` or later, but for files that later manifests name."""
        for number in range(oldest):
            yield from (self.root / name / str(number) for name in _NUMBERED)
            yield from matching(self.root / EPOCHS, f"*-generation{number}-*")

    def prune(self, oldest: int) -> None:
        """Delete what only generations before ``oldest`` need; done again, finish what was cut off.

        Raises ArtifactBusy if a process reads one of them or writes to the cache, StorageFull if the disk refuses.
        """
        assert self.pruned.oldest <= oldest <= self.newest, "a generation that is kept becomes the oldest"
        lock = Lock(self.root)
        try:
            is_newest = CacheManifest.read(self.root).digest == self.manifests[-1].digest
            if not is_newest or read_pruned(self.root) != self.pruned:
                raise ArtifactBusy(f"{self.root}: another process changed it meanwhile; run the same command again")
            if oldest > self.pruned.oldest:
                with _unread(self.root, range(self.pruned.oldest, oldest), self.newest):
                    note = {"oldest": oldest, "train_rows": self.train_rows[:oldest]}
                    write_atomically(self.root / PRUNED, seal(note))
            self._delete(oldest)
        except BaseException:
            lock.take_back()
            raise
        lock.release()

    def _delete(self, oldest: int) -> None:
        try:
            remove_temporary(self.root)  # a prune that was killed may have left one
            for file in self.unneeded(oldest):
                file.unlink(missing_ok=True)
            for folder in self._folders(oldest):
                for inner, _, _ in os.walk(folder, topdown=False, onerror=_raise_unless_gone):
                    try:
                        os.rmdir(inner)
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # a file that is needed lies there
                            raise
        except OSError as error:
            raise storage_refused(error, self.root) from error


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def numbered(root: Path) -> list[int]:
    """Return the generations of a cache that have a manifest of their own, the newest first."""
    parts = [file.stem.rpartition("-")[2] for file in matching(root, "manifest-[0-9]*.json") if file.is_file()]
    return sorted((int(part) for part in parts if part.isascii() and part.isdecimal()), reverse=True)


@contextmanager
def _unread(root: Path, numbers: Sequence[int], newest: int) -> Iterator[None]:
    """Keep new readers of some generations waiting inside; raise ArtifactBusy if there are any."""
    with _held(root, [manifest_name(number) for number in numbers]) as read:
        if read:
            first = min(number for number in numbers if manifest_name(number) in read)
            raise ArtifactBusy(f"{_are_read(root, read)}, or keep more, with --keep {newest - first + 1}")
        yield


@contextmanager
def unread(root: Path) -> Iterator[None]:
    """Keep new readers of a cache waiting inside; raise ArtifactBusy if there are any, of whatever generation.

    Of what is no cache nothing is held, nor on a file system without locks, where no reader holds anything either.
    """
    with ExitStack() as stack:
        read: list[str] = []
        with suppress(OSError, StorageFull):
            read = stack.enter_context(_held(root, [manifest_name(number) for number in numbered(root)]))
        if read:
            raise ArtifactBusy(_are_read(root, read))
        yield


def _are_read(root: Path, manifests: Sequence[str]) -> str:
    numbers = sorted((Path(name).stem.rpartition("-")[2] for name in manifests), key=int)
    one = f"generation {numbers[0]} is" if len(numbers) == 1 else f"generations {', '.join(numbers)} are"
    return f"{root}: {one} being read; wait until that is done"


@contextmanager
def _held(root: Path, manifests: Sequence[str]) -> Iterator[list[str]]:
    """Hold the locks of generations' manifests alone inside; yield those that somebody reads."""
    held: dict[str, int] = {}
    try:
        for name in manifests:
            held[name] = _opened(root / name)
        read = [name for name, file in held.items() if not _locked(file, root)]
        if read:
            gc.collect()  # a reader of this process that nothing uses any more, but for itself
            read = [name for name in read if not _locked(held[name], root)]
        yield read
    finally:
        for file in held.values():
            os.close(file)


def _opened(manifest: Path) -> int:
    try:
        return os.open(manifest, os.O_RDWR | os.O_CLOEXEC)  # NFS takes a lock alone only where one may write
    except PermissionError:
        return os.open(manifest, os.O_RDONLY | os.O_CLOEXEC)


def _locked(file: int, root: Path) -> bool:
    """Take the lock of an open file alone; return whether nobody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise unlockable(error, root) if error.errno in NO_LOCKS else storage_refused(error, root) from error
    return True
