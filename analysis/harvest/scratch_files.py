"""Arrays put aside while rows stream past, by name, and read back when the pass is over.

In files of a folder, which the pages of the system's file cache serve; or in memory where no folder is given. A spool
that was pickled still reads what it wrote, as long as its folder is there.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailrace.storage.artifact import is_disk_refusal, make_directory, storage_refused


class Spool:
    """Named sequences of items that only grow. Each spool has files of its own, even two of the same work."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / uuid.uuid4().hex
        self._in_memory: dict[str, list[NDArray[Any]]] = {}

    def append(self, name: str, items: NDArray[Any]) -> None:
        """Add items at the end of ``name``. Raises StorageFull if the disk refuses."""
        if self._folder is None:
            self._in_memory.setdefault(name, []).append(items.copy())
            return
        if not len(items):
            return
        path = self._folder / name
        make_directory(self._folder)
        try:
            # opened anew for every block, some seconds apart: no file is left open by whatever ends the pass
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(items).view(np.uint8).data)
        except OSError as error:
            if is_disk_refusal(error):
                raise storage_refused(error, path) from error
            raise

    def read(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return all items of ``name``, none if nothing was ever added; not to be written to."""
        if self._folder is None:
            parts = self._in_memory.get(name, [])
            found = np.concatenate(parts) if parts else np.empty(0, dtype)
        elif (path := self._folder / name).exists() and path.stat().st_size:
            found = np.asarray(np.memmap(path, dtype, mode="r"))
        else:
            found = np.empty(0, dtype)
        found.flags.writeable = False  # whatever it comes from, so that loops are compiled for one kind of array
        return found
