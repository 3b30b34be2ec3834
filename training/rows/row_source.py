"""Fresh rows on demand, for what training decides from data besides the batches: where to put dead features, where to
begin.

A sample is drawn from (seed, step) alone, so a resumed run draws what an uninterrupted one did, and it leaves the
training stream where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tailrace.storage.activation_cache import CacheSplit
from tailrace.storage.cache_format import Site
from tailrace.storage.memory import aligned_rows
from tailrace.storage.orders import GatheredOrder
from tailrace.storage.shuffle import EpochPlan, Span, deal, philox, random_permutation, sample_prefix
from tailrace.training.rows.batches import Batch, as_tensor, keys_of

_PURPOSE = "train/fresh rows"
_PROVENANCE = ("context", "position")
_N_THREADS = 4


class SampledRows(NamedTuple):
    """Rows of the training split, raw, and where each comes from if that is known."""

    batch: Batch
    context: np.ndarray | None
    """int64 (rows,)."""
    position: np.ndarray | None
    """int64 (rows,), in its context."""


class RowSource(Protocol):
    """A uniform sample of the training rows, another at every step."""

    def __call__(self, n_rows: int, step: int) -> SampledRows:
        """Return ``n_rows`` different rows, fewer only if there are no more; the same for the same arguments."""
        ...


class CacheRows:
    """Rows of one site of a cache's training split.

    Every unit gives a run that begins anywhere: rows lie in random order in it, so any run is a uniform sample of its
    unit. ``n_rows`` and ``order_seed`` are those of a stream that is restricted to so many rows (``CacheBatches``);
    samples then keep to the same rows.
    """

    def __init__(
        self,
        split: CacheSplit,
        site: Site,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        n_rows: int | None = None,
        order_seed: int = 0,
    ) -> None:
        self._split, self._site, self._seed, self._device = split, site, seed, torch.device(device)
        self._unit_rows = tuple(split.unit_rows)
        if n_rows is not None and n_rows < split.n_rows:
            self._unit_rows = sample_prefix(order_seed, split.name, split.unit_rows, n_rows)

    def __call__(self, n_rows: int, step: int) -> SampledRows:
        """Return a uniform sample without replacement, with context and position."""
        n_rows = min(n_rows, sum(self._unit_rows))
        activations = keys_of(self._site)
        arrays = self._read(SamplePlan.draw(self._seed, step, self._unit_rows, n_rows), [*activations, *_PROVENANCE])
        tensors = [
            as_tensor(arrays[key], self._split.dtype(key)).to(self._device).to(torch.float32) for key in activations
        ]
        context, position = (arrays[key].astype(np.int64) for key in _PROVENANCE)
        return SampledRows(Batch(tensors[0], tensors[-1]), context, position)

    def _read(self, plan: SamplePlan, keys: list[str]) -> Mapping[str, np.ndarray]:
        sources = {key: self._split.source(key) for key in keys}
        specs = [spec for source in sources.values() for spec in source.specs]
        stored = {spec.name: aligned_rows(plan.n_rows, spec.width, spec.memory_dtype) for spec in specs}
        with ThreadPoolExecutor(_N_THREADS) as pool:
            GatheredOrder(self._split, plan, specs, pool).load(0, stored)
        rows = {spec.name: stored[spec.name][: plan.n_rows] for spec in specs}
        return {key: source.decode(rows) for key, source in sources.items()}


@dataclass(frozen=True)
class SamplePlan(EpochPlan):
    """One bucket that takes a run of every unit, each from its own place, going on at the unit's start from its end."""

    whole_units: tuple[int, ...]
    """Rows that each unit has; ``unit_rows`` of them are taken."""
    starts: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, step: int, unit_rows: tuple[int, ...], n_rows: int) -> SamplePlan:
        """Draw how many rows each unit gives, as if rows were taken one by one, and where its run begins."""
        generator = np.random.Generator(philox(seed, _PURPOSE, step))
        counts = deal(generator, unit_rows, np.array([n_rows, sum(unit_rows) - n_rows]))[:, 0]
        starts = generator.integers(0, np.array(unit_rows))
        return cls(seed, step, "train", tuple(counts.tolist()), n_rows, unit_rows, tuple(starts.tolist()))

    def bucket_order(self, bucket: int) -> np.ndarray:
        """Return int64 (rows,): which row of the concatenated runs comes i-th."""
        assert bucket == 0, "a sample is one bucket"
        return random_permutation(philox(self.seed, f"{_PURPOSE}/order", self.epoch), self.n_rows)

    def spans(self, bucket: int) -> list[Span]:
        """Return the runs that make up the sample."""
        assert bucket == 0, "a sample is one bucket"
        spans = []
        for unit, (n_rows, n_whole, start) in enumerate(
            zip(self.unit_rows, self.whole_units, self.starts, strict=True)
        ):
            n_first = min(n_rows, n_whole - start)
            spans += [Span(unit, begin, begin + n) for begin, n in ((start, n_first), (0, n_rows - n_first)) if n]
        return spans
