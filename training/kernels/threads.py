"""Threads for compiled loops: as many as torch uses, each on a range of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def over_ranges(n: int, work: Callable[[int, int], object]) -> None:
    """Call ``work(start, stop)`` for ranges that make up [0, n), side by side."""
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        work(0, n)
        return
    bounds = [n * part // n_threads for part in range(n_threads + 1)]
    pending = [_pool(n_threads).submit(work, *pair) for pair in itertools.pairwise(bounds)]
    for done in pending:
        done.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernel")
