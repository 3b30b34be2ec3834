"""Files compared with their records: when they are opened, once a process until they change; and a sample of many."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from tailrace.storage.artifact import MANIFEST, REQUEST, SMALL, FileRecord, Manifest, check_files
from tailrace.storage.errors import ArtifactCorrupt


class Sample:
    """A share of all files, which are read; of others only the sizes are compared.

    Which files a seed stands for is decided by their recorded checksums: ``n_seeds`` seeds in a row read every file.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self.seed = share, seed
        self.n_files = self.n_read = self.n_bytes = self.n_bytes_read = 0

    @property
    def n_seeds(self) -> int:
        """How many seeds in a row read every file."""
        return math.ceil(1 / self.share)

    def reads(self, recorded: FileRecord) -> bool:
        """Return whether a file is among those that are read, and count it."""
        number = recorded.checksum.rpartition(":")[2][:12]
        at = int(number, 16) / 16**12 if set(number) <= set("0123456789abcdef") and number else 0.0
        is_drawn = (at + self.seed / self.n_seeds) % 1 < max(self.share, 1 / self.n_seeds)
        is_read = is_drawn or self.n_files == 0  # of a few files a small share would read none
        self.n_files, self.n_bytes = self.n_files + 1, self.n_bytes + recorded.bytes
        self.n_read, self.n_bytes_read = self.n_read + is_read, self.n_bytes_read + is_read * recorded.bytes
        return is_read


def refuse_damaged(root: Path, name: str, recorded: FileRecord, *, largest: int | None = None) -> None:
    """Raise ArtifactCorrupt if a file below ``root`` is not as its record says.

    Of a file of more than ``largest`` bytes, if that is given, only the size is compared. Once is enough for a process,
    until the file changes.
    """
    _refuse_damaged(root, name, recorded, largest, state_of(root / name))


def refuse_changed(file: Path, *, largest: int | None = SMALL) -> None:
    """Do the same for a file that the manifest of the artifact it lies in lists; nothing for any other file."""
    for root in (file.parent, file.parent.parent):
        if state := state_of(root / MANIFEST):
            recorded = _listed_files(root / MANIFEST, state).get(name := file.relative_to(root).as_posix())
            if recorded is not None:
                refuse_damaged(root, name, recorded, largest=largest)
            return


def state_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file does; nothing if it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _listed_files(manifest: Path, state: tuple[int, ...]) -> dict[str, FileRecord]:  # noqa: ARG001
    try:
        return Manifest.read_file(manifest).files
    except ArtifactCorrupt:
        if (manifest.parent / REQUEST).exists():
            raise
        return {}  # another program's file of that name


@lru_cache(maxsize=1 << 14)
def _refuse_damaged(
    root: Path,
    name: str,
    recorded: FileRecord,
    largest: int | None,
    state: tuple[int, ...],  # noqa: ARG001
) -> None:
    if problems := check_files(root, {name: recorded}, largest=largest):
        raise ArtifactCorrupt(
            f"{problems[0]}; run `pipeline verify` to list all damage, then restore the file, or delete the artifact "
            "and make it again"
        )
