"""``read_run`` puts the rows of a run where NumPy indexing would, whatever the kernel returns per call."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.storage import memory
from tailrace.storage.memory import aligned_rows, read_run, read_sequential

Preadv = Callable[[int, int, int, int], int]


@pytest.fixture
def descriptor() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def write_rows(descriptor: int, rows: np.ndarray) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, rows.tobytes(), 0)


def numbered_rows(n_rows: int, width: int | None, dtype: type = np.float32) -> np.ndarray:
    shape = (n_rows,) if width is None else (n_rows, width)
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# 63 and 64 float32 are the two sides of the 256 bytes from which rows are scattered by the kernel
@given(
    width=st.sampled_from([None, 1, 63, 64, 100]),
    n_file=st.integers(1, 60),
    n_extra=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_run_lands_where_numpy_would_put_it(
    width: int | None, n_file: int, n_extra: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, n_file - 1))
    stop = data.draw(st.integers(start + 1, n_file))
    destinations = np.random.Generator(np.random.Philox(seed)).permutation(stop - start + n_extra)[: stop - start]
    stored = numbered_rows(n_file, width)
    found = np.full((stop - start + n_extra, *stored.shape[1:]), -1, np.float32)
    expected = found.copy()
    expected[destinations] = stored[start:stop]
    with tempfile.TemporaryFile() as file:
        write_rows(file.fileno(), stored)
        read_run(file.fileno(), start, found, destinations)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("n_rows", [1023, 1024, 1025, 5000])
def test_runs_longer_than_one_call_may_fill_are_read_whole(descriptor: int, n_rows: int) -> None:
    stored = numbered_rows(n_rows + 7, 64)
    write_rows(descriptor, stored)
    destinations = np.random.Generator(np.random.Philox(n_rows)).permutation(n_rows)
    found = aligned_rows(n_rows, 64, np.dtype(np.float32))
    read_run(descriptor, 7, found, destinations)
    assert np.array_equal(found[destinations], stored[7:])


def short_preadv(limits: Iterator[int]) -> Preadv:
    """Return a ``preadv`` that reads at most the next of ``limits`` bytes, as a signal or a slow disk may cause."""

    def preadv(descriptor: int, pieces: int, n_pieces: int, offset: int) -> int:
        limit, done = next(limits), 0
        table = np.ctypeslib.as_array((ctypes.c_uint64 * (2 * n_pieces)).from_address(pieces)).reshape(-1, 2)
        for address, n_bytes in table.tolist():
            block = os.pread(descriptor, min(n_bytes, limit - done), offset + done)
            ctypes.memmove(address, block, len(block))
            done += len(block)
            if len(block) < n_bytes:
                break
        return done

    return preadv


@given(st.integers(1, 40), st.lists(st.integers(1, 2000), min_size=1, max_size=8), st.integers(0, 2**32))
def test_reads_cut_short_anywhere_are_continued(n_rows: int, limits: list[int], seed: int) -> None:
    stored = numbered_rows(n_rows, 64)
    destinations = np.random.Generator(np.random.Philox(seed)).permutation(n_rows)
    found = np.zeros_like(stored)
    endless = (limit for _ in range(10**6) for limit in limits)
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        write_rows(file.fileno(), stored)
        patch.setattr(memory, "_preadv", short_preadv(endless))
        read_run(file.fileno(), 0, found, destinations)
    assert np.array_equal(found[destinations], stored)


def test_without_preadv_rows_are_scattered_by_numpy(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_preadv", None)
    stored = numbered_rows(10, 100)
    write_rows(descriptor, stored)
    found = np.zeros((3, 100), np.float32)
    read_run(descriptor, 4, found, np.array([2, 0, 1]))
    assert np.array_equal(found, stored[[5, 6, 4]])


@pytest.mark.parametrize("width", [1, 64], ids=["small rows", "large rows"])
def test_a_file_that_ends_early_is_an_error(descriptor: int, width: int) -> None:
    write_rows(descriptor, numbered_rows(10, width))
    with pytest.raises(EOFError, match="file ends"):
        read_run(descriptor, 8, np.zeros((3, width), np.float32), np.arange(3))


def test_a_file_that_ends_inside_a_row_is_an_error(descriptor: int) -> None:
    write_rows(descriptor, numbered_rows(10, 64))
    os.ftruncate(descriptor, 10 * 256 - 1)
    with pytest.raises(EOFError, match="file ends 1 rows early"):
        read_run(descriptor, 0, np.zeros((10, 64), np.float32), np.arange(10))


def test_an_error_of_the_system_call_is_raised() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_run(10**6, 0, np.zeros((1, 64), np.float32), np.arange(1))


def test_sequential_reads_cut_short_are_continued(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = numbered_rows(20, 5)
    write_rows(descriptor, stored)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    found = np.zeros((17, 5), np.float32)
    read_sequential(descriptor, 3, found)
    assert np.array_equal(found, stored[3:])
