"""Page-aligned, reusable memory.

``numpy.empty`` puts large arrays 16 bytes past a page start, where ``preadv`` and memory copies run at half speed on
common processors and O_DIRECT refuses to work; and memory that was never touched costs a page fault every 4 kB.
So buffers are anonymous maps, made once and reused.

Read a contiguous run of rows from a file straight to scattered positions in memory.

The kernel copies each row to its final position, so a shuffled batch costs one copy, not a read and then a gather. The
list of addresses is built by NumPy and handed to ``preadv`` as it is, without a Python object per row.
"""

from __future__ import annotations

import ctypes
import mmap
import os
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


_ROWS_PER_CALL = 1024
"""IOV_MAX on Linux and macOS: the most pieces one call may fill."""
_SMALLEST_SCATTERED_ROW = 256
"""Below this many bytes a row, reading the run at once and scattering in NumPy is faster."""

_COPIED_BYTES = 16 << 20
"""Read at a time where a system has no call that reads straight into memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_preadv = getattr(_libc, "preadv64", None) or getattr(_libc, "preadv", None)
if _preadv is not None:
    _preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    _preadv.restype = ctypes.c_ssize_t


def read_run(descriptor: int, start: int, rows: np.ndarray, destinations: np.ndarray) -> None:
    """Read ``len(destinations)`` rows that begin at row ``start`` of a file into ``rows[destinations]``.

    ``rows`` is C-contiguous, (n,) or (n, width), of the file's dtype. Raises OSError, or EOFError if the file ends.
    """
    row_bytes = rows.itemsize * (rows.shape[1] if rows.ndim == 2 else 1)
    if _preadv is None or row_bytes < _SMALLEST_SCATTERED_ROW:
        rows[destinations] = _read_at_once(descriptor, start, rows, len(destinations))
        return
    pieces = np.empty((len(destinations), 2), np.uint64)
    pieces[:, 0] = destinations.astype(np.uint64) * np.uint64(row_bytes) + np.uint64(rows.ctypes.data)
    pieces[:, 1] = row_bytes
    _scatter(descriptor, start * row_bytes, pieces)


def read_sequential(descriptor: int, start: int, rows: np.ndarray) -> None:
    """Fill ``rows`` from row ``start`` of a file on."""
    row_bytes = rows.itemsize * (rows.shape[1] if rows.ndim == 2 else 1)
    view, offset = as_bytes(rows), 0
    while offset < len(view):
        n_read = _read_into(descriptor, view[offset:], start * row_bytes + offset)
        if n_read == 0:
            raise EOFError(f"file ends {len(view) - offset} bytes early")
        offset += n_read


def _read_into(descriptor: int, view: memoryview, start: int) -> int:
    """Read from byte ``start`` of a file into memory; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    data = os.pread(descriptor, min(len(view), _COPIED_BYTES), start)
    view[: len(data)] = data
    return len(data)


def _read_at_once(descriptor: int, start: int, rows: np.ndarray, n_rows: int) -> np.ndarray:
    run = np.empty((n_rows, *rows.shape[1:]), rows.dtype)
    read_sequential(descriptor, start, run)
    return run


def _scatter(descriptor: int, offset: int, pieces: np.ndarray) -> None:
    assert _preadv is not None, "the caller checks that preadv exists"
    base, done, n_pieces = pieces.ctypes.data, 0, len(pieces)
    while done < n_pieces:
        n_read = _preadv(descriptor, base + done * 16, min(_ROWS_PER_CALL, n_pieces - done), offset)
        if n_read < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if n_read == 0:
            raise EOFError(f"file ends {n_pieces - done} rows early")
        offset += n_read
        done, rest = _advance(pieces, done, n_read)
        if rest:
            # the kernel stopped inside a row: finish it from where it stopped
            pieces[done, 0] += np.uint64(rest)
            pieces[done, 1] -= np.uint64(rest)


def _advance(pieces: np.ndarray, done: int, n_read: int) -> tuple[int, int]:
    """Return the first unfinished piece and how many of its bytes were read."""
    ends = np.cumsum(pieces[done : done + _ROWS_PER_CALL, 1])
    finished = int(np.searchsorted(ends, n_read, side="right"))
    before = int(ends[finished - 1]) if finished else 0
    return done + finished, n_read - before
