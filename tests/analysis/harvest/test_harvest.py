from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.sums import OrderedSum
from tailrace.analysis.harvest.table import accumulators
from tailrace.analysis.tables import TABLES
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.storage.errors import ActionableError, NonFiniteActivation
from tests.support.analysis_subject import FakeCoder, FakeSplit, subject

PLAN = Plan(n_examples=3, block_rows=20, window_before=3, window_after=3, activation_rows=200)
KINDS = accumulators(TABLES)


def tables(harvest, analysed, plan=PLAN):
    return {table.name: pa.Table.from_batches(table.compute(harvest, analysed, plan), table.schema) for table in TABLES}


def partitions(n_units, n_parts):
    edges = np.linspace(0, n_units, n_parts + 1).astype(int)
    return [range(start, stop) for start, stop in pairwise(edges)]


@pytest.mark.parametrize("n_parts", [2, 3, 7])
@pytest.mark.parametrize("n_rows", [None, 90])
def test_any_number_of_partitions_gives_bit_identical_tables(n_parts, n_rows):
    plan = Plan(n_rows=n_rows, n_examples=3, block_rows=20, activation_rows=150)
    analysed = subject(FakeSplit(30, unit_rows=23, exact=False), FakeCoder(exact=False))
    whole = gather(analysed, plan, KINDS)
    parts = [
        pickle.loads(pickle.dumps(gather(analysed, plan, KINDS, units=units)))
        for units in partitions(analysed.split.n_units, n_parts)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert merged.units == whole.units == range(analysed.split.n_units)
    assert tables(merged, analysed, plan) == tables(whole, analysed, plan)


def test_pairs_that_wait_on_disk_give_the_tables_of_pairs_in_memory(tmp_path):
    analysed = subject(FakeSplit(30, unit_rows=23, exact=False), FakeCoder(exact=False))
    on_disk = replace(analysed, scratch=tmp_path)
    parts = [
        pickle.loads(pickle.dumps(gather(on_disk, PLAN, KINDS, units=units)))
        for units in partitions(analysed.split.n_units, 3)
    ]
    assert len(list(tmp_path.iterdir())) == 3  # a folder for each part
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert tables(parts[0], on_disk) == tables(gather(analysed, PLAN, KINDS), analysed)


def test_partitions_can_be_merged_before_they_reach_the_first():
    analysed = subject(FakeSplit(30, unit_rows=23, exact=False), FakeCoder(exact=False))
    first, second, third = (gather(analysed, PLAN, KINDS, units=units) for units in partitions(10, 3))
    second.merge(third)
    first.merge(second)
    assert tables(first, analysed) == tables(gather(analysed, PLAN, KINDS), analysed)


def test_adding_partial_sums_would_not_give_the_same_bits():
    """Shows that the fold in unit order is needed: a + (b + c) differs from (a + b) + c."""
    first, later = OrderedSum((), first_unit=0), OrderedSum((), first_unit=1)
    for part, values in ((first, [1e16]), (later, [1.0, 1.0])):
        for value in values:
            part.add(np.float64(value))
            part.end_unit()
    first.merge(later)
    assert first.total() == (1e16 + 1.0) + 1.0 == 1e16  # each 1 is lost in the rounding
    assert first.total() != 1e16 + (1.0 + 1.0)


def test_progress_adds_up_to_the_rows_read():
    analysed = subject()
    seen: list[int] = []
    gather(analysed, PLAN, KINDS, progress=seen.append)
    assert sum(seen) == analysed.split.n_rows


def test_no_block_is_larger_than_asked_for():
    largest = 0

    class Watching(FakeCoder):
        def encode(self, x):
            nonlocal largest
            largest = max(largest, len(x))
            return super().encode(x)

    gather(subject(coder=Watching()), PLAN, KINDS)
    assert largest == 14  # two contexts of 7 rows fit into 20


def test_a_split_without_rows_is_refused():
    split = FakeSplit(1, missing=[(0, position) for position in range(1, 8)])
    empty = replace(subject(FakeSplit(1)), split=split)
    with pytest.raises(ActionableError, match="split 'heldout' has no rows to analyse; choose the other split"):
        gather(empty, PLAN, KINDS)


def test_a_transcoder_that_yields_nan_is_refused_with_the_rows_named():
    coder = FakeCoder()
    coder.W_dec = torch.full_like(coder.W_dec, torch.nan)
    with pytest.raises(NonFiniteActivation, match=r"rows 0\.\.13 \(contexts 0\.\.1\)"):
        gather(subject(coder=coder), PLAN, KINDS)


def test_bfloat16_bits_are_read_as_numbers():
    exact, stored = FakeSplit(6), FakeSplit(6)
    stored.inputs, stored.outputs = (float32_to_bits(array) for array in (exact.inputs, exact.outputs))
    expected = subject(exact)
    as_bits = replace(expected, split=stored)  # quarters survive bfloat16
    assert tables(gather(as_bits, PLAN, KINDS), as_bits) == tables(gather(expected, PLAN, KINDS), expected)
