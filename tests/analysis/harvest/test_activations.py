"""Pairs put aside in the pass come back sorted, all of them, whatever the units and however little memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tailrace.analysis.harvest import activations as module
from tailrace.analysis.harvest.activations import KeptPairs, KeptRows, rows_within
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.rows import RowBlock
from tailrace.analysis.harvest.table import FEATURES_PER_BATCH
from tailrace.analysis.tables import activations as table
from tests.support.analysis_subject import FakeCoder, FakeSplit, activations, split_of, subject


def sorted_pairs(analysed, n_rows):
    acts = activations(analysed)[:n_rows]
    feature, row = np.nonzero(acts.T > 0)
    return feature.tolist(), row.tolist(), acts[row, feature].tolist()


def made(analysed, plan):
    harvest = gather(analysed, plan, table.TABLE.needs)
    rows = pa.Table.from_batches(table.compute(harvest, analysed, plan), table.SCHEMA)
    return tuple(rows[name].to_pylist() for name in ("feature", "row", "activation"))


@pytest.mark.parametrize("block_rows", [7, 30, 1000])
@pytest.mark.parametrize("sorted_at_once", [1, 40, 10**6])
def test_pairs_are_sorted_by_feature_then_row(block_rows, sorted_at_once, monkeypatch):
    monkeypatch.setattr(module, "SORTED_PAIRS", sorted_at_once)
    analysed = subject(FakeSplit(40, unit_rows=33))
    plan = Plan(block_rows=block_rows, activation_rows=10**6)
    assert made(analysed, plan) == sorted_pairs(analysed, None)


@pytest.mark.parametrize(("asked", "kept"), [(1, 0), (7, 7), (13, 7), (100, 98), (279, 273), (280, 280), (1000, 280)])
@pytest.mark.parametrize("block_rows", [7, 50])
def test_whole_contexts_within_the_rows_asked_for_are_kept(asked, kept, block_rows):
    analysed = subject(FakeSplit(40, unit_rows=33))  # 7 rows a context
    plan = Plan(block_rows=block_rows, activation_rows=asked)
    assert made(analysed, plan) == sorted_pairs(analysed, kept)
    harvest = gather(analysed, plan, [KeptPairs, KeptRows])
    assert harvest[KeptPairs].n_rows == kept
    assert harvest[KeptRows].contexts.tolist() == split_of(analysed).context[:kept].tolist()
    assert harvest[KeptRows].positions.tolist() == split_of(analysed).position[:kept].tolist()


def test_a_context_is_kept_only_if_it_ends_within_the_limit():
    block = RowBlock(0, 10, np.array([4, 4, 5, 5, 5]), np.array([1, 2, 1, 2, 3]), {})
    assert [rows_within(block, limit) for limit in (5, 10, 11, 12, 13, 14, 15, 99)] == [0, 0, 0, 2, 2, 2, 5, 5]


def test_rows_come_back_as_lists_of_features(monkeypatch):
    analysed = subject(FakeSplit(40, unit_rows=33))
    kept = gather(analysed, Plan(block_rows=20, activation_rows=10**6), [KeptPairs])[KeptPairs]
    acts = activations(analysed) > 0
    assert kept.row_counts().tolist() == acts.sum(axis=1).tolist()
    for n_pairs in (1, 17, 10**6):
        seen = []
        for piece in kept.feature_lists(n_pairs, 100):
            bounds = zip(piece.offsets, piece.offsets[1:], strict=False)
            seen += [piece.features[start:stop].tolist() for start, stop in bounds]
        assert seen == [np.flatnonzero(row).tolist() for row in acts[:100]]


def test_a_file_holds_a_run_of_features_named_by_its_first_and_last(monkeypatch):
    analysed = subject(FakeSplit(10), FakeCoder(d_sae=FEATURES_PER_BATCH + 5))
    plan = Plan(activation_rows=1000)
    harvest = gather(analysed, plan, table.TABLE.needs)
    files = {
        name: [batch["feature"].to_pylist() for batch in rows] for name, rows in table.files(harvest, analysed, plan)
    }
    assert list(files) == ["features-000000-001023", "features-001024-001028"]
    assert {feature for batch in files["features-001024-001028"] for feature in batch} <= set(range(1024, 1029))
