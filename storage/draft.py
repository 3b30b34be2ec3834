"""A directory that is being made: locked, resumed by the same request, and left as it was by any other.

A refusal leaves the output path untouched. So the path is checked before the lock, which is a file, is taken, and a
lock that is taken back removes its file and the directories that were made for it.

The differences between two JSON values, in few lines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from tailrace.storage.artifact import (
    JSON,
    MANIFEST,
    REQUEST,
    canonical_json,
    check_members,
    describe_files,
    make_directory,
    read_json,
    read_sealed,
    seal,
    storage_refused,
    sync_files,
    write_atomically,
)
from tailrace.storage.errors import ArtifactBusy, ArtifactCorrupt, ArtifactMismatch, StorageFull
from tailrace.storage.formats import refuse_newer
from tailrace.storage.names import (
    LOCK,
    NO_FILE,
    entries_below,
    is_plural,
    is_temporary,
    refuse_lost,
    remove_temporary,
    with_article,
)
from tailrace.storage.parsing import parse_json, read_regular

_DIGEST = re.compile(r"(\w+:[0-9a-f]{12})[0-9a-f]{20,}")
_NAMED = 3
"""Most parts of an object that are named in one line, and most that have a line each, where many differ alike."""


@dataclass(frozen=True)
class _Leaf:
    """A path at which the values differ, and how."""

    path: tuple[str, ...]
    difference: str
    is_digest: bool = False

    def alike(self) -> tuple[tuple[str, ...], str]:
        """Return a key that is equal for leaves that one line reports: digests differ each in its own way."""
        return self.path, "" if self.is_digest else self.difference

    def line(self) -> str:
        """Return the path and both values."""
        return f"{'.'.join(self.path)}: {self.difference}"


def list_differences(existing: Any, wanted: Any) -> list[str]:
    """Return a line for every leaf in which two JSON values differ, naming it with both values; digests are shortened.

    An object with nothing on the other side is one difference, whatever it holds. Where more than three parts of an
    object differ in the same way (all runs of a sweep, the transcoders of all layers), one line reports them, with
    ``*`` for the part's name.
    """
    return [leaf.line() for leaf in _leaves(existing, wanted)]


def _leaves(existing: Any, wanted: Any) -> list[_Leaf]:
    if isinstance(existing, dict) and isinstance(wanted, dict):
        return list(_leaves_of_object(existing, wanted))
    if isinstance(existing, dict) and wanted is None:
        return [_Leaf((), "is there, not asked for")]
    if isinstance(wanted, dict) and existing is None:
        return [_Leaf((), "is not there, asked for")]
    if existing == wanted:
        return []
    is_digest = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (existing, wanted))
    return [_Leaf((), f"there it is {_shown(existing)}, asked for {_shown(wanted)}", is_digest)]


def _leaves_of_object(existing: dict[str, Any], wanted: dict[str, Any]) -> Iterator[_Leaf]:
    inside = {key: _leaves(existing.get(key), wanted.get(key)) for key in sorted(existing.keys() | wanted.keys())}
    parts: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for key, leaves in inside.items():
        if isinstance(existing.get(key, wanted.get(key)), dict):
            for leaf in leaves:
                parts.setdefault(leaf.alike(), []).append(key)
    reported = set()
    for key, leaves in inside.items():
        for leaf in leaves:
            names = parts.get(leaf.alike(), [])
            if len(names) <= _NAMED or key not in names:
                yield _Leaf((key, *leaf.path), leaf.difference, leaf.is_digest)
            elif leaf.alike() not in reported:
                reported.add(leaf.alike())
                difference = "there it is another than asked for" if leaf.is_digest else leaf.difference
                where = f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
                yield _Leaf(("*", *leaf.path), f"{difference} ({where})")


def _shown(value: Any) -> str:
    """Return a value as it is written, a digest by its first twelve characters."""
    return _DIGEST.sub(r"\1…", repr(value))


_TRIES = 100
_LISTED = 5
"""Files that a refusal names."""


def some_of(names: Sequence[object]) -> str:
    """Return the names that a refusal lists of those that are in its way."""
    return ", ".join(map(str, names[:_LISTED])) + (" and more" if len(names) > _LISTED else "")


class Lock:
    """An exclusive lock on a directory, given up when the process ends, however it ends.

    Makes the directory if there is none. Raises ArtifactBusy, or StorageFull if the disk refuses.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._file: int | None = None
        self._made: list[Path] = []
        """Directories, then the lock file, that were made for the lock."""
        try:
            for _ in range(_TRIES):
                if self._take():
                    return
        except BlockingIOError:
            pass
        except OSError as error:
            self._remove_made()
            if error.errno in NO_LOCKS:
                raise unlockable(error, directory) from error
            raise storage_refused(error, directory) from error
        raise ArtifactBusy(
            f"{directory}: another process is writing here; wait for it to finish or choose another path"
        )

    def _take(self) -> bool:
        """Lock the file; return whether it still has its name: a refused process deletes a file that it made."""
        try:
            self._made += make_directory(self._path.parent)
            file, is_new = _open(self._path)
        except FileNotFoundError:  # another process took its lock back a moment ago
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), self._path.lstat()):
                raise FileNotFoundError
        except FileNotFoundError:
            os.close(file)
            return False
        except OSError as error:
            os.close(file)
            if is_new and not isinstance(error, BlockingIOError):
                self._path.unlink()
            raise
        self._file = file
        self._made += [self._path] * is_new
        return True

    def release(self) -> None:
        """Release the lock, if it is held; its file stays."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def remove(self) -> None:
        """Release the lock and delete its file."""
        with suppress(OSError):
            if _is_own(self._path):
                self._path.unlink()  # while it is locked: a process that opened it meanwhile sees that its name is gone
        self.release()

    def take_back(self) -> None:
        """Release the lock and delete what was made for it, but for directories that hold something else."""
        if self._path in self._made:
            self.remove()
        else:
            self.release()
        self._remove_made()

    def _remove_made(self) -> None:
        for directory in reversed(self._made):
            with suppress(OSError):
                directory.rmdir()


NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Answers of a file system that has no locks: NFS without its lock daemon, some of FUSE."""


def unlockable(error: OSError, directory: Path) -> StorageFull:
    """Return the error, with its next step, for a file system that has no locks."""
    return StorageFull(
        f"{directory}: its file system has no locks ({os.strerror(error.errno or 0)}), so that two processes could "
        "write the same files; choose a path on a local disk, or have locking switched on"
    )


def _open(path: Path) -> tuple[int, bool]:
    """Return the descriptor of a lock's file and whether the file is new."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags), False


class Draft:
    """A directory being made. Use as a context manager: the lock is held inside, nothing is published on leaving.

    Opening the same request again resumes it; another request on the same path is refused with every
    difference shown, and ``discard_with``, the option that throws an unfinished draft away. An error before anything
    was written deletes the request, so that corrected settings may use the same path.

    The lock of a draft that is ``inside`` another is taken and released at once: the other's keeps processes out, and
    thousands of drafts hold no file open. In a finished artifact nothing is begun but what is ``part_of`` it.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        request: Mapping[str, JSON],
        *,
        discard_with: str | None = None,
        inside: bool = False,
        part_of: Path | None = None,
    ) -> None:
        self._discard_with = discard_with
        self.path = path
        self.kind = kind
        self.request = json.loads(canonical_json(dict(request)))
        if not inside:
            self._refuse_inside(part_of)
        self._check_path()
        self._lock = Lock(path)
        try:
            self._check_path()  # again, now that no other process can change it
            if not self.resumed:
                write_atomically(path / REQUEST, canonical_json(self.request))
            remove_temporary(path)
        except BaseException:
            self._lock.take_back()
            raise
        if inside:
            self._lock.release()

    def _refuse_inside(self, whole: Path | None) -> None:
        """Raise ArtifactMismatch if the path lies in a finished artifact, which ``verify`` and ``rm`` take for one."""
        for folder in self.path.absolute().parents:
            if whole is not None and folder == whole.absolute():
                return
            if (folder / MANIFEST).is_file() and holds_artifact(folder):
                raise ArtifactMismatch(
                    f"{self.path}: lies in the finished artifact {folder} and would be deleted with it; choose a path "
                    "outside of it"
                )

    def _check_path(self) -> None:
        """Set ``published`` and ``resumed``; raise ArtifactMismatch if something else lies at the path."""
        try:
            refuse_lost(self.path / MANIFEST)
            self.published = (self.path / MANIFEST).exists()
            self.resumed = self.published or _is_request(self.path / REQUEST)
            if self.resumed:
                self._refuse_other_request()
            elif foreign := _foreign(self.path):
                if REQUEST in foreign and LOCK not in foreign and (self.path / LOCK).exists():
                    raise ArtifactCorrupt(
                        f"{self.path / REQUEST}: is not as it was written, so that nothing says what was begun here; "
                        f"restore it, or delete {self.path} and run the same command again"
                    )
                raise ArtifactMismatch(
                    f"{self.path}: is not empty (holds {', '.join(foreign[:5])}) and is no {self.kind}; choose an "
                    "empty directory"
                )
        except OSError as error:
            raise storage_refused(error, self.path) from error

    def _refuse_other_request(self) -> None:
        existing = self._published_request() if self.published else read_json(self.path / REQUEST)
        if isinstance(existing, dict):
            refuse_newer(self.path, self.kind, existing)
        if differences := list_differences(existing, self.request):
            state = "published" if self.published else "unfinished"
            what, verb = f"{state} {self.kind}", "lie" if is_plural(self.kind) else "lies"
            anew = f", or throw it away with {self._discard_with}" if self._discard_with and not self.published else ""
            raise ArtifactMismatch(
                f"{self.path}: {what if is_plural(self.kind) else with_article(what)} with other settings {verb} here; "
                f"use the same settings, or choose another path{anew}:\n"
                + "\n".join(f"  {line}" for line in differences)
            )

    def _published_request(self) -> JSON:
        manifest = read_sealed(self.path / MANIFEST)
        if manifest.get("kind") != self.kind:
            raise ArtifactMismatch(
                f"{self.path}: holds {with_article(str(manifest.get('kind')))} already; choose another path for the "
                f"{self.kind}"
            )
        return manifest["request"]

    def publish(
        self,
        manifest: Mapping[str, JSON],
        files: Iterable[str],
        *,
        beside: Iterable[str] = (),
        written: Mapping[str, JSON] = MappingProxyType({}),
    ) -> dict[str, JSON]:
        """Write the manifest, which makes the artifact complete; return it as written.

        ``beside``: files and folders that may lie in the artifact's folder and are no part of it. ``written``: what
        ``describe_files`` said of files when they were written. Raises ArtifactMismatch for any other file there,
        ArtifactCorrupt if one has changed, or an artifact inside has, StorageFull if the disk refuses.
        """
        names = sorted(files)
        self._refuse_others({*names, *beside, LOCK, REQUEST, MANIFEST})
        sync_files(self.path, names)
        described = describe_files(self.path, names)
        self._refuse_damaged(
            [name for name in names if described[name] != written.get(name, described[name])], manifest
        )
        content = {
            **manifest,
            "kind": self.kind,
            "request": self.request,
            "files": described,
        }
        write_atomically(self.path / MANIFEST, seal(content))
        self.published = True
        return read_sealed(self.path / MANIFEST)

    def _refuse_damaged(self, changed: Iterable[str], manifest: Mapping[str, JSON]) -> None:
        problems = [f"{self.path / name}: differs from what was written" for name in changed]
        if problems := problems + check_members(self.path, manifest):
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ArtifactCorrupt(
                f"{self.path}: is not published, since files changed after they were written. Restore them, or delete "
                f"the folder they lie in, and run the same command again:\n{lines}"
            )

    def _refuse_others(self, known: Set[str]) -> None:
        remove_temporary(self.path)
        names = [path.relative_to(self.path) for path in entries_below(self.path)]
        others = [name for name in names if not known & {str(part) for part in (name, *name.parents)}]
        if others:
            raise ArtifactMismatch(
                f"{self.path}: holds files that are no part of the {self.kind}: {some_of(others)}. Move them "
                "away and run the same command again: all that is finished is kept"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_begun():
            self._lock.take_back()
        else:
            self._lock.release()

    def _is_begun(self) -> bool:
        """Return whether anything was written; if not, delete the request."""
        with suppress(OSError):  # the error that ended the block is reported
            if {entry.name for entry in self.path.iterdir()} <= {LOCK, REQUEST}:
                (self.path / REQUEST).unlink(missing_ok=True)
                return False
        return True


def _foreign(directory: Path) -> list[str]:
    """Return the names in a directory, if it exists, that are not left from a draft killed at its start."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in directory.iterdir() if not _is_own(entry))


def _is_request(path: Path) -> bool:
    """Return whether a file is a draft's request; other programs have files of that name too."""
    try:
        data = read_regular(path)
        request = parse_json(data)
    except (*NO_FILE, ValueError):
        return False
    return isinstance(request, dict) and canonical_json(request) == data


def _is_own(entry: Path) -> bool:
    if entry.name == LOCK:
        return entry.lstat().st_size == 0  # ours is empty; other programs write into theirs which process holds it
    return is_temporary(entry.name) and entry.name.startswith(f".{REQUEST}.")


def holds_artifact(folder: Path) -> bool:
    """Return whether a folder is an artifact, finished or not; a file of these names alone is anybody's.

    Raises OSError for what cannot be read.
    """
    try:
        if (folder / LOCK).is_file() and (folder / REQUEST).is_file():
            return True
        if (folder / MANIFEST).is_file() and _is_request(folder / REQUEST):
            return True  # of which the manifest may be damaged, and the lock lost by git or a copy
        manifest = parse_json(read_regular(folder / MANIFEST))
    except (*NO_FILE, ValueError):
        return False
    return isinstance(manifest, dict) and {"kind", "digest"} <= manifest.keys()
