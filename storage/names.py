"""Names of kinds of artifacts, of files that are being written, and of files that a manifest lists."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import glob
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from tailrace.storage.errors import ArtifactCorrupt

_TEMPORARY = re.compile(r"\..+(\.tmp-(?P<host>[^/]+)-(?P<process>\d+)-\d+|\.parquet\.tmp\d+|\.tmp-records)")
"""Names of ``temporary_path``, and the two forms that release 0.1 gave its tables and records."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that Linux and macOS take at most, or fewer."""
_LONGEST_KEPT = 120
"""Bytes of a name that a temporary one keeps."""
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What the system says where there is no such file; other OSErrors are of a file that it refuses."""
LOCK = ".lock"
"""The file by which a process holds a directory that it writes."""
RESTORE = "restore it, or delete the artifact and make it again"
"""What to do about a file that is not as it was written."""


def with_article(kind: str) -> str:
    """Return ``a transcoder``, ``an export`` or, in the plural, ``tables``."""
    if is_plural(kind):
        return kind
    return f"{'an' if kind[:1] in tuple('aeiou') else 'a'} {kind}"


def is_plural(kind: str) -> bool:
    """Return whether the name of a kind is a plural, as that of tables is."""
    return kind.endswith("s")


def temporary_path(path: Path) -> Path:
    """Return the name under which ``path`` is written first; no other thread, process or machine uses it."""
    return path.with_name(f"{_begin_of(path)}{os.uname().nodename}-{os.getpid()}-{threading.get_native_id()}")


def _begin_of(path: Path) -> str:
    """Return how names of ``temporary_path`` begin; of a long name a part, so that they are none too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_KEPT:
        name = f"{name[: _LONGEST_KEPT // 8]}-{xxhash.xxh3_64_hexdigest(os.fsencode(name))}"
    return f".{name}.tmp-"


def temporary_paths_of(path: Path) -> list[Path]:
    """Return what lies beside ``path`` under the names that ``temporary_path`` gives it in any process."""
    begin, folder = _begin_of(path), path.absolute().parent
    return sorted(folder / name for name in os.listdir(folder) if name.startswith(begin) and is_temporary(name))


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a file, or of a folder for one, while it is written."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporary(root: Path) -> None:
    """Delete what killed writers left half-written below ``root``. Only for the holder of the lock on it.

    Folders that have locks of their own are left alone: another process may be writing there.
    """
    for path in entries_below(root):
        if is_temporary(path.name):
            _delete(path)


def remove_abandoned(path: Path) -> None:
    """Delete what killed processes of this machine left half-written of ``path``, which no lock guards."""
    with suppress(OSError):  # what is left is in nobody's way
        for entry in path.parent.iterdir():
            name = _TEMPORARY.fullmatch(entry.name)
            if name and entry.name.startswith(_begin_of(path)) and name["host"] == os.uname().nodename:
                try:
                    os.kill(int(name["process"]), 0)
                except ProcessLookupError:
                    _delete(entry)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def entries_below(root: Path) -> Iterator[Path]:
    """Yield what lies below ``root`` but in folders that are written under locks of their own; links as they are."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False) or is_temporary(entry.name):
            yield path
        elif not (path / LOCK).exists():
            yield from entries_below(path)


def files_below(root: Path, *, but: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield every file below ``root``, links among them, but for those in folders ``but`` some.

    Of a ``root`` that is not there, none.

    Raises OSError for a folder that cannot be listed, which ``os.walk`` and ``Path.rglob`` pass over in silence.
    """
    for entry in _listing(root):
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False):
            yield path
        elif but is None or not but(path):
            yield from files_below(path, but=but)


def matching(root: Path, pattern: str) -> list[Path]:
    """Return the paths below ``root`` that a shell's pattern names, sorted; ``**`` stands for any number of folders.

    A name with a dot in front is passed over unless the pattern spells the dot. Raises OSError for a folder that cannot
    be listed, which ``glob`` and ``Path.glob`` pass over in silence.
    """
    parts = Path(pattern).parts
    return sorted(set(_matching(root, parts))) if parts else []


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    first, *rest = parts
    if first == "**":
        yield from _matching(folder, rest or ["*"])
        for entry in _listing(folder):
            if not entry.name.startswith(".") and Path(entry.path).is_dir() and not _leads_up(entry):
                yield from _matching(Path(entry.path), parts)
    elif glob.has_magic(first):
        for entry in _listing(folder):
            is_hidden = entry.name.startswith(".") and not first.startswith(".")
            if fnmatch.fnmatchcase(entry.name, first) and not is_hidden and (not rest or Path(entry.path).is_dir()):
                yield from _matching(Path(entry.path), rest) if rest else [Path(entry.path)]
    elif rest:
        yield from _matching(folder / first, rest)
    elif (folder / first).exists():
        yield folder / first


def _leads_up(entry: os.DirEntry[str]) -> bool:
    """Return whether a link leads to a folder that it lies in, so that following it would never end."""
    return entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve())


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, sorted; nothing of one that is not there."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def by_number(name: str) -> list[tuple[int, str]]:
    """Return a key by which numbers inside names sort as numbers: layer 10 after layer 9."""
    parts = re.split(r"(\d{1,18})", name)  # every second part is a number
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def inside(root: Path, name: str) -> Path:
    """Return the path of a file below ``root`` by a name that was read from a file; the path need not exist.

    Raises ArtifactCorrupt for a name or a link that leads out of ``root``, and for what is no regular file: a device or
    a pipe may never end.
    """
    if (problem := name_problem(name) or _file_problem(root, name)) is not None:
        raise ArtifactCorrupt(
            f"{root}: names the file {name!r}, which {problem}; an artifact names files of its own folder only. If you "
            "trust it, copy it with what its links lead to (cp -rL); else do not use it"
        )
    return root / name


def home_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` as the home folder; ``~x``, where there is no user x, is a name as any other."""
    return Path(os.path.expanduser(path))


def path_problem(path: Path) -> str | None:
    """Return why the system can have no such path, or None; whether anything lies there is another matter."""
    try:
        if "\0" in str(path):
            return "holds a null byte"
        os.fsencode(path)
    except UnicodeEncodeError as error:
        return error.reason
    lengths = [len(os.fsencode(part)) for part in path.parts]
    is_too_long = max(lengths, default=0) > _LONGEST_NAME or sum(lengths) + len(lengths) > _LONGEST_PATH
    return os.strerror(errno.ENAMETOOLONG) if is_too_long else None


def name_problem(name: object) -> str | None:
    """Return why a name, with ``/`` between its parts, cannot be that of a file below a folder, or None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return "is no name of a file"
    if name.startswith("/"):
        return "begins at the root of the file system"
    if {"", ".", ".."} & set(name.split("/")):
        return "has '..', '.' or nothing between two '/'"
    return None


def folder_problem(name: object) -> str | None:
    """Return why a name cannot be that of a direct subfolder, or None."""
    return name_problem(name) or ("has a '/'" if "/" in str(name) else None)


def _file_problem(root: Path, name: str) -> str | None:
    try:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            return "is a link that leads out of it"
        return None if stat.S_ISREG((root / name).stat().st_mode) else "is no regular file"
    except FileNotFoundError:
        return None
    except PermissionError:
        return None  # whoever opens it says so
    except (OSError, RuntimeError) as error:  # a name too long, a folder's name on a file, a loop of links
        return f"cannot be looked at ({error})"


def discard(temporary: Path) -> None:
    """Delete a half-written file if the disk allows: the error that left it behind is reported."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def is_being_written(path: Path) -> bool:
    """Return whether a process holds the lock of an artifact that it makes or changes."""
    try:
        file = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


def refuse_lost(manifest: Path) -> None:
    """Raise ArtifactCorrupt if a manifest is gone and that of a later generation than the first is there."""
    if manifest.exists():
        return
    if later := matching(manifest.parent, f"{manifest.stem}-[1-9]*{manifest.suffix}"):
        raise ArtifactCorrupt(f"{manifest}: is missing, and {later[0].name} says that it was there; {RESTORE}")
