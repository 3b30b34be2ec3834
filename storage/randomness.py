"""Random numbers by purpose: (seed, purpose, indices) alone decide every draw.

Permutations are the sorting order of raw Philox words rather than ``Generator.permutation``: the words are fixed by
the algorithm, while NumPy may change how it turns them into a permutation, and an order that is half on disk and half
redrawn must not change with a library version.
"""

from __future__ import annotations

import numpy as np
import xxhash


def philox(seed: int, purpose: str, *indices: int) -> np.random.Philox:
    """Return the Philox bit generator of (seed, purpose, indices); different names never share a stream."""
    name = "/".join([str(seed), purpose, *map(str, indices)])
    return np.random.Philox(key=xxhash.xxh3_128(name.encode()).intdigest())


def random_permutation(bits: np.random.Philox, n: int) -> np.ndarray:
    """Return a uniformly random permutation of range(n) (int64): the order of n random 64-bit keys.

    Two equal keys keep their order; for n = 262,144 that happens with probability 2e-9 and then favours one of two
    neighbours, which no statistic can see.
    """
    return np.argsort(bits.random_raw(n), kind="stable")


def invert(permutation: np.ndarray) -> np.ndarray:
    """Return ``inverse`` with ``inverse[permutation[i]] == i``."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return inverse
