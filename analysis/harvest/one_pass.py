"""One pass over a split: every accumulator that any table needs sees every block once.

A harvest covers a run of units. Harvests of consecutive runs merge into what one long pass would have given, to the
bit, so units can be shared among workers in any way. A harvest holds numbers only (no model, no open file) and can
be pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tailrace.analysis.harvest.block import EncodedBlock
from tailrace.analysis.harvest.encoding import (
    Coder,
    DenseEncoder,
    Encoder,
    expected_density,
    open_encoder,
    selection_in_use,
)
from tailrace.analysis.harvest.rows import RowBlock, TokenOrderSplit, iter_blocks
from tailrace.analysis.weights.unembedding import TokenEffects
from tailrace.storage.errors import ActionableError
from tailrace.training.rows.batches import as_tensor
from tailrace.training.rows.transfer import begun_early, to_device

PROBE_ROWS: Final = 1024
"""Rows on which the share of active pairs is measured."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions that shape a harvest."""

    n_rows: int | None = None
    """Rows from the start of what is read; None for all."""
    block_rows: int = 8192
    n_examples: int = 20
    window_before: int = 16
    window_after: int = 16
    activation_rows: int = 0
    """Rows from the start of what is read whose activations are kept; whole contexts only."""
    n_bands: int = 5
    """Equal parts of the range from zero to a feature's maximum."""
    n_band_examples: int = 5
    """Examples of each band, from the rows whose activations are kept."""
    n_random_examples: int = 10
    """Examples among all active rows, from the same rows."""
    seed: int = 0
    """Decides which examples of bands and of all active rows are taken."""
    coactivation_floor: float = 1e-4
    """Share of rows on which a feature must be active for its co-activation to be counted."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A transcoder and the rows that it is analysed on."""

    coder: Coder
    split: TokenOrderSplit
    split_name: str
    site: str
    output_mean: NDArray[np.float64]
    """(d_out,) roughly the mean output; see ``RowTotals``."""
    vocabulary: Sequence[str]
    """Token id → its text."""
    device: torch.device | str = "cpu"
    effects: TokenEffects | None = None
    """Effects of features on the logits; None without the language model, or for outputs that do not reach them."""
    density: float | None = None
    """Share of pairs that are active, which decides how rows are encoded; measured on the first rows if None."""
    scratch: Path | None = None
    """Folder for pairs until they are sorted; None for memory."""
    predicts_outputs: bool = True
    """Whether the coder's features alone predict the outputs. Those of a layer of a cross-layer transcoder do not:
    earlier layers' features write to the same outputs."""

    @cached_property
    def context_length(self) -> int:
        """Positions of a context."""
        return int(self.split.context_tokens(np.zeros(1, np.int64)).shape[1])


class Accumulator(Protocol):
    """Counts kept in the pass. Blocks of a unit come in row order; ``merge`` appends units that come later."""

    @classmethod
    def start(cls, subject: Subject, plan: Plan, first_unit: int, /) -> Self:
        """Return an empty accumulator for a harvest that begins at ``first_unit``."""
        ...

    def add(self, block: EncodedBlock, /) -> None:
        """Count a block."""
        ...

    def end_unit(self) -> None:
        """Close the float sums of a unit, which is complete."""
        ...

    def merge(self, later: Any, /) -> None:
        """Add an accumulator of the same class over the next units."""
        ...


AnyAccumulator = TypeVar("AnyAccumulator", bound=Accumulator)


class Harvest:
    """The accumulators of a run of consecutive units, by class."""

    def __init__(self, kinds: Sequence[type[Accumulator]], subject: Subject, plan: Plan, first_unit: int = 0) -> None:
        self.units = range(first_unit, first_unit)
        self._accumulators = {kind: kind.start(subject, plan, first_unit) for kind in kinds}

    def __getitem__(self, kind: type[AnyAccumulator]) -> AnyAccumulator:
        accumulator = self._accumulators[kind]
        assert isinstance(accumulator, kind)
        return accumulator

    def add(self, block: EncodedBlock, pool: ThreadPoolExecutor | None = None) -> None:
        """Count a block of the open unit in every accumulator, of which a pool's threads take one each."""
        for _ in (pool.map if pool else map)(lambda counts: counts.add(block), self._accumulators.values()):
            pass

    def end_unit(self) -> None:
        """Close the open unit in every accumulator."""
        for accumulator in self._accumulators.values():
            accumulator.end_unit()
        self.units = range(self.units.start, self.units.stop + 1)

    def merge(self, later: Harvest) -> None:
        """Append the harvest of the next units."""
        assert later.units.start == self.units.stop, "harvests merge in unit order"
        for kind, accumulator in self._accumulators.items():
            accumulator.merge(later._accumulators[kind])
        self.units = range(self.units.start, later.units.stop)


def gather(
    subject: Subject,
    plan: Plan,
    kinds: Sequence[type[Accumulator]],
    *,
    units: range | None = None,
    progress: Callable[[int], object] = int,
) -> Harvest:
    """Return the harvest of ``units`` (default: all of the split); ``progress`` is called with each block's rows.

    Memory: a unit of activations, the pairs of ``plan.block_rows`` rows or a piece of dense activations, and the
    accumulators.
    Raises ActionableError for a split without rows, NonFiniteActivation where the transcoder or the cache holds one.
    """
    refuse_empty(subject)
    units = units if units is not None else range(subject.split.n_units)
    harvest = Harvest(kinds, subject, plan, units.start)
    keys = [f"{subject.site}/in", f"{subject.site}/out"]
    encode = open_encoder(subject.coder, subject.device, find_density(subject))
    blocks = iter_blocks(subject.split, keys, block_rows=plan.block_rows, n_rows=plan.n_rows, units=units)
    opened, pool = _opened(subject, blocks, keys, encode), None
    if torch.device(subject.device).type == "cuda":
        # the disk, the GPU and the cores work side by side, where otherwise all cores encode
        opened = begun_early(_opened(subject, begun_early(blocks), keys, encode))
        pool = ThreadPoolExecutor(len(kinds))
    for block in opened:
        while harvest.units.stop < block.rows.unit:
            harvest.end_unit()
        with torch.inference_mode():
            harvest.add(block, pool)
        progress(block.rows.n_rows)
        del block  # a view of its unit, whose memory the next unit needs
    while harvest.units.stop < units.stop:
        harvest.end_unit()
    return harvest


def refuse_empty(subject: Subject) -> None:
    """Raise ActionableError if the split has no rows."""
    if subject.split.n_rows == 0:
        raise ActionableError(
            f"split {subject.split_name!r} has no rows to analyse; choose the other split, or make a cache that has it"
        )


def find_density(subject: Subject) -> float | None:
    """Return the share of pairs that are active: given, fixed by the architecture, or measured on the first rows.

    None where nothing depends on it.
    """
    if subject.density is not None:
        return subject.density
    if torch.device(subject.device).type != "cpu" or selection_in_use(subject.coder) is None:
        return None
    fixed = expected_density(subject.coder)
    return fixed if fixed is not None else measure_density(subject)


def measure_density(subject: Subject) -> float:
    """Return the share of pairs that are active on the first rows of the split. Reads its first unit."""
    key = f"{subject.site}/in"
    first = next(iter_blocks(subject.split, [key], block_rows=PROBE_ROWS, n_rows=PROBE_ROWS))
    with torch.inference_mode():
        pairs = DenseEncoder(subject.coder)(_on_device(subject, first, key)).pairs
    return len(pairs) / (first.n_rows * subject.coder.d_sae)


def _open_block(subject: Subject, rows: RowBlock, keys: list[str], encode: Encoder) -> EncodedBlock:
    outputs = as_tensor(rows.arrays[keys[1]], subject.split.dtype(keys[1])).float()
    return EncodedBlock(rows, _on_device(subject, rows, keys[0]), outputs, encode)


def _on_device(subject: Subject, rows: RowBlock, key: str) -> torch.Tensor:
    return to_device(as_tensor(rows.arrays[key], subject.split.dtype(key)), torch.device(subject.device)).float()


def _opened(subject: Subject, blocks: Iterable[RowBlock], keys: list[str], encode: Encoder) -> Iterator[EncodedBlock]:
    """Yield the blocks; on a GPU they are encoded before they are asked for anything."""
    for rows in blocks:
        block = _open_block(subject, rows, keys, encode)
        del rows
        if block.inputs.is_cuda:
            with torch.inference_mode():
                block.encode()
        yield block
        del block
