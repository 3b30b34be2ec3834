"""A published directory is complete or absent: drafts, manifests, checksums, atomic files.

``manifest.json`` is written last, so its presence is the one sign that an artifact is complete. Until then the
directory is a draft: it holds ``request.json`` (what was asked for) and whatever is finished so far, and only
the process that holds its lock may write to it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from storage.differences import list_differences
from storage.errors import (
    ArtifactBusy,
    ArtifactCorrupt,
    ArtifactIncomplete,
    ArtifactMismatch,
    ArtifactMissing,
    StorageFull,
)
from storage.formats import refuse_newer

JSON = Any
"""A value that ``json`` can write: null, bool, number, string, list or string-keyed mapping of these."""

MANIFEST = "manifest.json"
REQUEST = "request.json"
LOCK = ".lock"
_DISK_REFUSALS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO}


def canonical_json(value: JSON) -> bytes:
    """Return the one JSON text of ``value``: sorted keys, two spaces, a final newline; NaN is refused."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest(value: JSON) -> str:
    """Return ``sha256:…`` of the canonical JSON text of ``value``."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def checksum_file(path: Path) -> str:
    """Return the ``xxh3:…`` checksum (128 bits) of a file's bytes."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            state.update(block)
    return "xxh3:" + state.hexdigest()


def storage_refused(error: OSError, path: Path) -> StorageFull:
    """Turn an OSError of a write into the error a user can act on."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageFull(
        f"{path}: cannot be written ({reason}). Everything finished so far is kept: "
        "free some space or fix the permissions, then run the same command again to continue"
    )


def is_disk_refusal(error: OSError) -> bool:
    """Tell whether the disk refused a write: full, read-only, no permission, or failing."""
    return error.errno in _DISK_REFUSALS


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and the ones above it, so that they survive a power cut.

    Raises StorageFull if the disk refuses.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            if is_disk_refusal(error):
                raise storage_refused(error, directory) from error
            raise
        sync_directory(directory.parent)


def temporary_path(path: Path) -> Path:
    """Return the name under which ``path`` is written first; no other thread, process or machine uses it."""
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}-{threading.get_native_id()}")


def discard(temporary: Path) -> None:
    """Delete a half-written file if the disk allows: the error that left it behind is the one to report."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old bytes or all the new ones, whatever happens.

    Raises StorageFull if the disk refuses.
    """
    temporary = temporary_path(path)
    try:
        _write_synced(temporary, data)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        discard(temporary)
        if is_disk_refusal(error):
            raise storage_refused(error, path) from error
        raise


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        written = 0
        while written < len(data):
            # a disk that fills up takes what fits and only refuses the next call
            written += os.write(descriptor, memoryview(data)[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(root: Path, names: Iterable[str]) -> None:
    """Make files under ``root``, and their names, survive a power cut."""
    folders: set[Path] = set()
    for name in names:
        with (root / name).open("rb") as file:
            os.fsync(file.fileno())
        folders |= {folder for folder in (root / name).parents if folder.is_relative_to(root)}
    for folder in sorted(folders):
        sync_directory(folder)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; raise ArtifactCorrupt if it is gone or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactCorrupt(f"{path}: is missing; restore it or rebuild the artifact") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactCorrupt(f"{path}: is not valid JSON ({error}); restore it or rebuild the artifact") from error


def seal(manifest: Mapping[str, JSON]) -> bytes:
    """Return the bytes of a manifest with its own digest inside, so that a changed byte is found."""
    return canonical_json({**manifest, "digest": digest(dict(manifest))})


def read_sealed(path: Path) -> dict[str, JSON]:
    """Read a sealed manifest; raise ArtifactCorrupt if its content differs from its digest.

    Raises ArtifactMismatch for a format that a newer version wrote.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or "digest" not in manifest:
        raise ArtifactCorrupt(f"{path}: is no manifest (it has no digest); restore it or rebuild the artifact")
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if seal(content) != path.read_bytes():
        raise ArtifactCorrupt(f"{path}: differs from its own digest; restore it or rebuild the artifact")
    refuse_newer(path.parent, str(manifest.get("kind")), manifest)
    return manifest


def read_manifest(path: Path, kind: str, instead: Mapping[str, str] | None = None) -> dict[str, JSON]:
    """Return the manifest of a published artifact of ``kind``.

    ``instead`` says, by the kind found, what to do with one that was given for it. Raises ArtifactMissing,
    ArtifactIncomplete, ArtifactCorrupt, or ArtifactMismatch for another kind.
    """
    if not (path / MANIFEST).exists():
        if (path / REQUEST).exists():
            this, was, it, they = ("these", "were", "them", "they") if _is_plural(kind) else ("this", "was", "it", "it")
            raise ArtifactIncomplete(
                f"{path}: {this} {kind} {was} never finished; run the command that makes {it} again and {they} will "
                "continue"
            )
        verb, it = ("are", "them") if _is_plural(kind) else ("is", "it")
        raise ArtifactMissing(f"{path}: there {verb} no {kind} here; check the path, or make {it} first")
    manifest = read_sealed(path / MANIFEST)
    if manifest.get("kind") != kind:
        found = _one(str(manifest.get("kind")))
        way_on = (instead or {}).get(str(manifest.get("kind")), f"give the path of {_one(kind)}")
        raise ArtifactMismatch(f"{path}: holds {found}, wanted {_one(kind)}; {way_on}")
    return manifest


def _one(kind: str) -> str:
    if _is_plural(kind):
        return kind
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _is_plural(kind: str) -> bool:
    return kind.endswith("s")


def verify_artifact(path: Path, kind: str) -> list[str]:
    """Re-read every file of a published artifact and return a sentence for each that differs from its record."""
    try:
        manifest = read_manifest(path, kind)
    except ArtifactCorrupt as error:
        return [str(error)]
    return check_request(path, manifest) + check_files(path, manifest["files"])


def check_request(path: Path, manifest: Mapping[str, JSON]) -> list[str]:
    """Compare ``request.json`` with the request in the manifest; return the difference."""
    request = path / REQUEST
    if not request.exists() or request.read_bytes() != canonical_json(manifest["request"]):
        return [f"{request}: differs from the request in the manifest"]
    return []


def check_files(path: Path, files: Mapping[str, Mapping[str, JSON]]) -> list[str]:
    """Compare files under ``path`` with their recorded ``bytes`` and ``checksum``; return the differences."""
    problems = []
    for name, recorded in sorted(files.items()):
        file = path / name
        if not file.exists():
            problems.append(f"{file}: is missing")
        elif (n_bytes := file.stat().st_size) != recorded["bytes"]:
            problems.append(f"{file}: has {n_bytes} bytes, its record says {recorded['bytes']}")
        elif (found := checksum_file(file)) != recorded["checksum"]:
            problems.append(f"{file}: checksum is {found}, its record says {recorded['checksum']}")
    return problems


def describe_files(path: Path, names: Iterable[str]) -> dict[str, dict[str, JSON]]:
    """Return ``{name: {bytes, checksum}}`` of files under ``path``."""
    return {
        name: {"bytes": (path / name).stat().st_size, "checksum": checksum_file(path / name)} for name in sorted(names)
    }


class Lock:
    """An exclusive lock on a directory, given up when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        try:
            make_directory(directory)
            self._file = (directory / LOCK).open("ab")
        except OSError as error:
            if is_disk_refusal(error) or isinstance(error, FileExistsError | NotADirectoryError | FileNotFoundError):
                raise storage_refused(error, directory) from error
            raise
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ArtifactBusy(
                f"{directory}: another process is writing here; wait for it to finish or choose another path"
            ) from error

    def release(self) -> None:
        """Give the lock up."""
        self._file.close()


class Draft:
    """A directory being made. Use as a context manager: the lock is held inside, nothing is published on leaving.

    Opening the same request again resumes it; another request on the same path is refused with every
    difference shown, and ``discard_with``, the option that throws an unfinished one away. An error before anything was
    written takes the request back, so that corrected settings may use the same path.
    """

    def __init__(self, path: Path, kind: str, request: Mapping[str, JSON], *, discard_with: str | None = None) -> None:
        self._discard_with = discard_with
        self.path = path
        self.kind = kind
        self.request = json.loads(canonical_json(dict(request)))
        self._lock = Lock(path)
        try:
            for leftover in path.glob(".*.tmp-*"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
            self.resumed = (path / REQUEST).exists()
            self.published = (path / MANIFEST).exists()
            if self.resumed:
                self._refuse_other_request()
            elif foreign := sorted(entry.name for entry in path.iterdir() if not _is_own(entry.name)):
                raise ArtifactMismatch(
                    f"{path}: is not empty (holds {', '.join(foreign[:5])}) and is no {kind}; choose an empty directory"
                )
            else:
                write_atomically(path / REQUEST, canonical_json(self.request))
        except BaseException:
            self._lock.release()
            raise

    def _refuse_other_request(self) -> None:
        existing = self._published_request() if self.published else read_json(self.path / REQUEST)
        if isinstance(existing, dict):
            refuse_newer(self.path, self.kind, existing)
        if differences := list_differences(existing, self.request):
            state = "published" if self.published else "unfinished"
            what, verb = f"{state} {self.kind}", "lie" if _is_plural(self.kind) else "lies"
            anew = f", or throw it away with {self._discard_with}" if self._discard_with and not self.published else ""
            raise ArtifactMismatch(
                f"{self.path}: {what if _is_plural(self.kind) else _one(what)} with other settings {verb} here; "
                f"use the same settings, or choose another path{anew}:\n"
                + "\n".join(f"  {line}" for line in differences)
            )

    def _published_request(self) -> JSON:
        manifest = read_sealed(self.path / MANIFEST)
        if manifest.get("kind") != self.kind:
            raise ArtifactMismatch(
                f"{self.path}: holds {_one(str(manifest.get('kind')))} already; choose another path for the {self.kind}"
            )
        return manifest["request"]

    def publish(self, manifest: Mapping[str, JSON], files: Iterable[str]) -> dict[str, JSON]:
        """Write the manifest, which makes the artifact complete; return it as written."""
        names = sorted(files)
        sync_files(self.path, names)
        content = {
            **manifest,
            "kind": self.kind,
            "request": self.request,
            "files": describe_files(self.path, names),
        }
        write_atomically(self.path / MANIFEST, seal(content))
        self.published = True
        return read_sealed(self.path / MANIFEST)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(OSError):  # the error that ended the block is the one to report
                if {entry.name for entry in self.path.iterdir()} <= {LOCK, REQUEST}:
                    (self.path / REQUEST).unlink(missing_ok=True)
        self._lock.release()


def _is_own(name: str) -> bool:
    """Tell whether a file is one that a draft killed at its very beginning leaves behind."""
    return name == LOCK or name.startswith(f".{REQUEST}.tmp")
