"""The disks that a power cut may leave, by the model of the ALICE paper: what was not synced may be lost, or not.

A name lives until its folder is synced, bytes until their file is. POSIX promises no more, and file systems differ in
which of it they lose; so a disk is made of each extreme, and of a mixture.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import xxhash

from tests.faults.lab import Call

CHANGES_BYTES = ("write", "truncate", "ftruncate", "fallocate")


class File:
    """Bytes as processes see them, and those that are sure to survive."""

    def __init__(self, data: bytes = b"", synced: bytes = b"") -> None:
        self.data = data
        self.synced = synced

    @property
    def zeroed(self) -> bytes:
        """The synced bytes, with zeros for what came later: a file system may write the length first."""
        return self.synced.ljust(len(self.data), b"\0")


class Folder(Enum):
    """A folder's name; what lies in it has names of its own."""

    NAME = 0


_Entry = File | Folder
_Names = dict[str, _Entry]
_Change = dict[str, _Entry | None]


class State(NamedTuple):
    """A disk after a power cut."""

    label: str
    names: Mapping[str, _Entry]
    content: Callable[[File], bytes]

    def build(self) -> None:
        """Write the disk's files; nothing may lie where they go."""
        written: dict[File, str] = {}
        for path, entry in sorted(self._reachable()):
            if entry is Folder.NAME:
                os.mkdir(path)
            elif entry in written:
                os.link(written[entry], path)
            else:
                Path(path).write_bytes(self.content(entry))
                written[entry] = path

    def digest(self) -> bytes:
        """Return a digest of all names and bytes."""
        state = xxhash.xxh3_128()
        for path, entry in sorted(self._reachable()):
            state.update(path.encode())
            state.update(b"/" if entry is Folder.NAME else self.content(entry))
        return state.digest()

    def _reachable(self) -> Iterator[tuple[str, _Entry]]:
        """Yield the names whose folders survived too; the shortest path is that of the top."""
        top = min(self.names, key=len, default="")
        reached: set[str] = set()
        for path, entry in sorted(self.names.items()):
            if path == top or os.path.dirname(path) in reached:
                reached.add(path)
                yield path, entry


class Disk:
    """Names and files as they are while calls are replayed, and what of them is sure to survive."""

    def __init__(self, top: Path) -> None:
        self._names: _Names = {str(top): Folder.NAME}
        self._files: dict[int, File] = {}
        for path in top.rglob("*"):
            if path.is_dir():
                self._names[str(path)] = Folder.NAME
            else:
                data = path.read_bytes()
                self._names[str(path)] = self._files[path.stat().st_ino] = File(data, data)
        self._sure = dict(self._names)
        self._unsynced: dict[str, list[_Change]] = {}
        """By folder, the changes of names in it since it was synced."""

    def copy(self) -> Disk:
        """Return a disk that later calls do not change."""
        return copy.deepcopy(self)

    def replay(self, call: Call) -> None:
        """Do what a call did."""
        name, path, file = call.name, call.path, self._files.get(call.inode)
        if file is not None and name != "create" and self._names.get(path) is not file:
            self._rename_unseen(file, path)
        if name == "create":
            self._files[call.inode] = made = File()
            self._change({path: made})
        elif name == "rename":
            self._change({call.other: self._names[path], path: None})
        elif name == "link":
            self._change({call.other: self._names[path]})
        elif name == "mkdir":
            self._change({path: Folder.NAME})
        elif name in ("unlink", "rmdir"):
            self._change({path: None})
        elif name == "fsync" and file is None:
            self._sync_names(path)
        elif name == "fsync":
            assert file is not None
            file.synced = file.data
        elif name in CHANGES_BYTES:
            assert file is not None, f"{path} was never opened"
            file.data = _changed(file.data, call)

    def _rename_unseen(self, file: File, path: str) -> None:
        """Give a file the name that a call shows it to have: safetensors renames without the C library."""
        (before,) = [name for name, entry in self._names.items() if entry is file]
        self._change({path: file, before: None})

    def _change(self, change: _Change) -> None:
        _apply(change, self._names)
        if (renamed := _renamed_folder(change)) is not None:
            for folder in [folder for folder in self._unsynced if _is_inside(folder, renamed[0])]:
                changes = self._unsynced.pop(folder)
                moved = [{_moved(path, renamed): entry for path, entry in one.items()} for one in changes]
                self._unsynced[_moved(folder, renamed)] = moved
        for folder in {os.path.dirname(path) for path in change}:
            self._unsynced.setdefault(folder, []).append(change)

    def _sync_names(self, folder: str) -> None:
        for change in self._unsynced.pop(folder, []):
            _apply({path: entry for path, entry in change.items() if os.path.dirname(path) == folder}, self._sure)

    def states(self, seed: object) -> Iterator[State]:
        """Yield the disks that a power cut may leave now."""
        rng = random.Random(f"{seed}")
        yield State("names-kept-bytes-lost", self._names, lambda file: file.synced)
        yield State("names-kept-bytes-zero", self._names, lambda file: file.zeroed)
        yield State("names-lost-bytes-kept", self._sure, lambda file: file.data)
        yield State("names-lost-bytes-lost", self._sure, lambda file: file.synced)
        mixed = dict(self._sure)
        for changes in self._unsynced.values():
            for change in changes[: rng.randint(0, len(changes))]:
                _apply(change, mixed)
        kept = {file for file in self._files.values() if rng.random() < 0.5}
        yield State("mixed", mixed, lambda file: file.data if file in kept else file.synced)


def _apply(change: _Change, names: _Names) -> None:
    if (renamed := _renamed_folder(change)) is not None:  # what lies in it comes along
        for path in [path for path in names if _is_inside(path, renamed[0])]:
            names[_moved(path, renamed)] = names.pop(path)
    for path, entry in change.items():
        if entry is None:
            names.pop(path, None)
        else:
            names[path] = entry


def _renamed_folder(change: _Change) -> tuple[str, str] | None:
    """Return the former and the new name of a folder that a change renames."""
    new = [path for path, entry in change.items() if entry is Folder.NAME]
    old = [path for path, entry in change.items() if entry is None]
    return (old[0], new[0]) if old and new else None


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _moved(path: str, renamed: tuple[str, str]) -> str:
    old, new = renamed
    return new + path[len(old) :] if _is_inside(path, old) else path


def _changed(data: bytes, call: Call) -> bytes:
    """Return a file's bytes after a call that changes them."""
    match call.name:
        case "truncate":
            return b""
        case "ftruncate":
            return data[: call.offset].ljust(call.offset, b"\0")
        case "fallocate":
            return data.ljust(call.offset + call.size, b"\0")
    return data[: call.offset].ljust(call.offset, b"\0") + call.data + data[call.offset + call.size :]
