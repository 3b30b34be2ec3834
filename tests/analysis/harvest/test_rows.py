from __future__ import annotations

import numpy as np
import pytest

from tailrace.analysis.harvest.rows import RowBlock, SampledSplit, block_edges, in_split, iter_blocks, units_of
from tests.support.analysis_subject import FakeSplit


def describe(blocks: list[RowBlock]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    return [
        (block.unit, block.first_row, list(zip(block.context.tolist(), block.position.tolist(), strict=True)))
        for block in blocks
    ]


@pytest.mark.parametrize("unit_rows", [3, 7, 10, 14, 1000])
@pytest.mark.parametrize("block_rows", [1, 7, 20, 1000])
def test_every_row_comes_once_in_order_and_no_context_is_cut(unit_rows, block_rows):
    split = FakeSplit(5, unit_rows=unit_rows)  # 7 rows per context
    blocks = list(iter_blocks(split, ["layer0/in"], block_rows=block_rows))
    assert np.array_equal(np.concatenate([block.context for block in blocks]), split.context)
    assert np.array_equal(np.concatenate([block.position for block in blocks]), split.position)
    assert np.array_equal(np.concatenate([block.arrays["layer0/in"] for block in blocks]), split.inputs)
    assert [block.first_row for block in blocks] == np.cumsum([0, *(block.n_rows for block in blocks[:-1])]).tolist()
    assert all(block.n_rows % 7 == 0 and block.n_rows <= max(block_rows, 7) for block in blocks)


@pytest.mark.parametrize("unit_rows", [3, 7, 10, 14])
def test_any_partition_of_the_units_gives_the_blocks_of_one_pass(unit_rows):
    split = FakeSplit(6, unit_rows=unit_rows)
    whole = describe(list(iter_blocks(split, [], block_rows=10)))
    for cut in range(split.n_units + 1):
        parts = [range(cut), range(cut, split.n_units)]
        joined = [block for units in parts for block in iter_blocks(split, [], block_rows=10, units=units)]
        assert describe(joined) == whole


@pytest.mark.parametrize("n_rows", [1, 7, 10, 23, 42])
def test_a_row_limit_reads_exactly_the_first_rows_whatever_the_partition(n_rows):
    split = FakeSplit(6, unit_rows=10)
    whole = list(iter_blocks(split, [], block_rows=10, n_rows=n_rows))
    assert sum(block.n_rows for block in whole) == n_rows
    single = [
        block
        for unit in range(split.n_units)
        for block in iter_blocks(split, [], block_rows=10, n_rows=n_rows, units=range(unit, unit + 1))
    ]
    assert describe(single) == describe(whole)


def test_blocks_hold_as_many_whole_contexts_as_fit():
    contexts = np.array([0, 0, 1, 1, 1, 1, 1, 2, 3, 3])
    assert block_edges(contexts, 4) == [0, 2, 7, 10]  # context 1 alone is longer than a block
    assert block_edges(contexts, 7) == [0, 7, 10]
    assert block_edges(contexts, 100) == [0, 10]


@pytest.mark.parametrize("unit_rows", [3, 7, 10, 1000])
@pytest.mark.parametrize(("n_rows", "n_contexts"), [(1, 1), (14, 2), (20, 2), (41, 5)])
def test_drawn_contexts_come_with_all_their_rows_whatever_the_units(unit_rows, n_rows, n_contexts):
    split = FakeSplit(6, unit_rows=unit_rows)  # 7 rows per context
    drawn = SampledSplit(split, n_rows, seed=3)
    blocks = list(iter_blocks(drawn, ["layer0/in"], block_rows=10))
    contexts = np.concatenate([block.context for block in blocks])
    assert np.unique(contexts, return_counts=True)[1].tolist() == [7] * n_contexts
    assert (drawn.n_contexts, drawn.of_contexts, drawn.n_rows) == (n_contexts, 6, 7 * n_contexts)
    rows = in_split(drawn, np.arange(drawn.n_rows))
    assert rows.tolist() == SampledSplit(FakeSplit(6), n_rows, seed=3).rows.tolist()
    assert np.array_equal(split.context[rows], contexts)
    assert np.array_equal(split.inputs[rows], np.concatenate([block.arrays["layer0/in"] for block in blocks]))
    assert units_of(drawn, np.arange(drawn.n_rows)).tolist() == (rows // unit_rows).tolist()
    single = [
        block
        for unit in range(drawn.n_units)
        for block in iter_blocks(drawn, [], block_rows=10, units=range(unit, unit + 1))
    ]
    assert describe(single) == describe(list(iter_blocks(drawn, [], block_rows=10)))


def test_every_context_is_drawn_equally_often():
    counts = np.zeros(12)
    for seed in range(300):
        counts[np.unique(SampledSplit(FakeSplit(12), 28, seed).rows // 7)] += 1
    assert counts.sum() == 300 * 4
    assert ((counts - 100) ** 2 / 100).sum() < 24.7  # chi-square with 11 degrees of freedom, 1 %; seeds are fixed
