"""Page-aligned, reusable memory.

``numpy.empty`` puts large arrays 16 bytes past a page start, where ``preadv`` and memory copies run at half speed on
common processors and O_DIRECT refuses to work; and memory that was never touched costs a page fault every 4 kB.
So buffers are anonymous maps, made once and reused.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

PAGE = 4096


def aligned_rows(n_rows: int, width: int | None, dtype: np.dtype) -> np.ndarray:
    """Return a zeroed page-aligned array of shape (n_rows, width), or (n_rows,) where ``width`` is None."""
    shape = (n_rows,) if width is None else (n_rows, width)
    n_bytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
    # private: Linux gives huge pages to shared memory only on request of the administrator, and a forked process
    # would write into ours
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages refuses the advice
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype, count=int(np.prod(shape))).reshape(shape)


def as_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array without copying."""
    return array.reshape(-1).view(np.uint8).data
