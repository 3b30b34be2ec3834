"""The plan of a true shuffle: which rows of which unit are served when. Pure; touches no file.

Every unit of the cache is written in a uniformly random order of its own. An epoch's order then needs only two more
draws: how many rows of each unit go to each bucket (multivariate hypergeometric, as if all rows were dealt to the
buckets without looking), and the order inside each bucket. Because a unit is already in random order, *which* of its
rows go to a bucket may as well be a contiguous run. The composition is a uniformly random permutation of all rows,
decided by (seed, epoch) alone.

Random numbers by purpose: (seed, purpose, indices) alone decide every draw.

Permutations are the sorting order of raw Philox words rather than ``Generator.permutation``: the words are fixed by
the algorithm, while NumPy may change how it turns them into a permutation, and an order that is half on disk and half
redrawn must not change with a library version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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


_NUMPY_POPULATION_LIMIT = 10**9
"""Generator.multivariate_hypergeometric refuses populations of this size or more."""


class Span(NamedTuple):
    """A contiguous run of the stored rows of a unit."""

    unit: int
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """A contiguous run of the stored rows of a unit, and the position in the bucket of each of its rows."""

    unit: int
    start: int
    stop: int
    destinations: np.ndarray
    """int64 (stop - start,): position in the bucket's final order of each row of the run."""


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch over rows of permuted units."""

    seed: int
    epoch: int
    split: str
    unit_rows: tuple[int, ...]
    """Rows taken from each unit; always its first ones, which is a uniform sample since the unit is permuted."""
    bucket_rows: int

    @property
    def n_rows(self) -> int:
        """Rows served in this epoch."""
        return sum(self.unit_rows)

    @property
    def n_buckets(self) -> int:
        """Buckets of ``bucket_rows`` rows; the last may be short."""
        return -(-self.n_rows // self.bucket_rows)

    def rows_in_bucket(self, bucket: int) -> int:
        """Return the number of rows of one bucket."""
        return min(self.bucket_rows, self.n_rows - bucket * self.bucket_rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 (n_units, n_buckets): rows of each unit that go to each bucket."""
        sizes = np.array([self.rows_in_bucket(bucket) for bucket in range(self.n_buckets)], np.int64)
        generator = np.random.Generator(philox(self.seed, f"{self.split}/deal", self.epoch))
        return deal(generator, self.unit_rows, sizes)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.asarray(np.cumsum(self.counts, axis=1) - self.counts)

    def bucket_order(self, bucket: int) -> np.ndarray:
        """Return int64 (rows,): ``order[i]`` = which row of the concatenated runs is served i-th."""
        bits = philox(self.seed, f"{self.split}/bucket", self.epoch, bucket)
        return random_permutation(bits, self.rows_in_bucket(bucket))

    def spans(self, bucket: int) -> list[Span]:
        """Return the stored rows that make up a bucket, in unit order, empty runs left out."""
        rows = enumerate(zip(self._starts[:, bucket].tolist(), self.counts[:, bucket].tolist(), strict=True))
        return [Span(unit, start, start + n_rows) for unit, (start, n_rows) in rows if n_rows]

    def runs(self, bucket: int) -> list[Run]:
        """Return the same with the position of every row."""
        destinations = invert(self.bucket_order(bucket))
        offset, runs = 0, []
        for span in self.spans(bucket):
            end = offset + span.stop - span.start
            runs.append(Run(*span, destinations[offset:end]))
            offset = end
        return runs


def unit_permutation(seed: int, split: str, unit: int, n_rows: int) -> np.ndarray:
    """Return int64 (n_rows,): ``permutation[p]`` = the unit's row, in token order, that is stored at position p."""
    return random_permutation(philox(seed, f"{split}/unit", unit), n_rows)


def deal(generator: np.random.Generator, unit_rows: Sequence[int], bucket_sizes: np.ndarray) -> np.ndarray:
    """Deal the rows of every unit to buckets of fixed sizes, uniformly without replacement.

    Returns int64 (n_units, n_buckets) with row sums ``unit_rows`` and column sums ``bucket_sizes``.
    """
    remaining = bucket_sizes.astype(np.int64).copy()
    counts = np.zeros((len(unit_rows), len(bucket_sizes)), np.int64)
    for unit, n_rows in enumerate(unit_rows):
        draw = _draw_by_law if remaining.sum() < _NUMPY_POPULATION_LIMIT else _draw_by_tickets
        counts[unit] = draw(generator, remaining, n_rows)
        remaining -= counts[unit]
    assert not remaining.any(), "bucket sizes must add up to the number of rows"
    return counts


def _draw_by_law(generator: np.random.Generator, remaining: np.ndarray, n_rows: int) -> np.ndarray:
    return np.asarray(generator.multivariate_hypergeometric(remaining, n_rows, method="marginals"), np.int64)


def _draw_by_tickets(generator: np.random.Generator, remaining: np.ndarray, n_rows: int) -> np.ndarray:
    """Draw ``n_rows`` distinct slots among all that remain: the same law, at any population, slower."""
    tickets = generator.choice(int(remaining.sum()), n_rows, replace=False, shuffle=False)
    buckets = np.searchsorted(np.cumsum(remaining), tickets, side="right")
    return np.bincount(buckets, minlength=len(remaining)).astype(np.int64)


def sample_prefix(seed: int, split: str, unit_rows: Sequence[int], n_rows: int) -> tuple[int, ...]:
    """Return how many leading rows of each unit make a uniform sample of ``n_rows`` rows; the same for every epoch."""
    total = sum(unit_rows)
    generator = np.random.Generator(philox(seed, f"{split}/prefix", n_rows))
    return tuple(deal(generator, unit_rows, np.array([n_rows, total - n_rows]))[:, 0].tolist())


def default_bucket_rows(shard_rows: int, n_rows: int, *, smallest_run: int = 512) -> int:
    """Return the bucket size that keeps an average run at ``smallest_run`` rows or more.

    A bucket takes ``shard_rows · bucket_rows / n_rows`` rows of each unit on average; one unit's worth of rows per
    bucket is enough up to 134 million rows at 262,144 rows a shard, above that buckets double.
    """
    bucket_rows = shard_rows
    while bucket_rows < n_rows and shard_rows * bucket_rows < min(smallest_run, shard_rows) * n_rows:
        bucket_rows *= 2
    return bucket_rows
