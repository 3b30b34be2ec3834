"""Buffers begin on a page, hold zeros, and belong to the process that made them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tailrace.storage.memory import PAGE, aligned_rows, as_bytes
from tests.support.paths import ROOT


@pytest.mark.parametrize(("n_rows", "width", "shape"), [(3, 5, (3, 5)), (1000, None, (1000,)), (0, 4, (0, 4))])
def test_buffers_begin_on_a_page_and_hold_zeros(n_rows: int, width: int | None, shape: tuple[int, ...]) -> None:
    rows = aligned_rows(n_rows, width, np.dtype(np.float32))
    assert rows.shape == shape
    assert rows.ctypes.data % PAGE == 0
    assert not rows.any()
    assert rows.flags.writeable


def test_bytes_are_a_view() -> None:
    rows = aligned_rows(2, 2, np.dtype(np.uint16))
    rows[1, 0] = 0x0102
    assert bytes(as_bytes(rows)) == bytes([0, 0, 0, 0, 2, 1, 0, 0])
    as_bytes(rows)[0] = 7
    assert rows[0, 0] == 7


FORK = """
import os
import numpy as np
from tailrace.storage.memory import aligned_rows
rows = aligned_rows(1, 4, np.dtype(np.int32))
child = os.fork()
if child == 0:
    rows[...] = 1
    os._exit(0)
os.waitpid(child, 0)
print(rows.tolist())
"""


def test_a_forked_process_has_a_copy_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[[0, 0, 0, 0]]\n"
