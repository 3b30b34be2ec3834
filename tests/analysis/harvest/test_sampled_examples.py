"""Examples of bands and of active rows are the ones of smallest hash, checked by brute force in plain integers."""

from __future__ import annotations

import numpy as np
import pytest

from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.tables import examples as table
from tests.support.analysis_subject import CONTEXT_LENGTH, FakeSplit, activations, split_of, subject

PLAN = Plan(
    n_examples=3, n_bands=5, n_band_examples=4, n_random_examples=6, block_rows=50, activation_rows=10**6, seed=11
)
WORD = 2**64


def mixed(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % WORD
    return bits ^ (bits >> 31)


def hash_of(seed, feature, row):
    return mixed((mixed((mixed(seed % WORD) + feature * 0x9E3779B97F4A7C15) % WORD) + row) % WORD)


def rows_of_table(analysed, plan):
    harvest = gather(analysed, plan, table.TABLE.needs)
    return [row for batch in table.compute(harvest, analysed, plan) for row in batch.to_pylist()]


def expected_rows(column, feature, plan, band=None):
    """Return the rows of smallest hash in a band (None: of all active rows), strongest first."""
    active = column > 0
    if band is not None:
        low, high = (float(column.max()) * edge / plan.n_bands for edge in (band, band + 1))
        active = (column > low) & (column <= high)
    n = plan.n_random_examples if band is None else plan.n_band_examples
    chosen = sorted(np.flatnonzero(active).tolist(), key=lambda row: hash_of(plan.seed, feature, row))[:n]
    return sorted(chosen, key=lambda row: (-column[row], row))


@pytest.fixture(scope="module", params=[True, False], ids=["quarters", "floats"])
def analysed(request):
    return subject(FakeSplit(60, unit_rows=50, exact=request.param))


@pytest.mark.parametrize("seed", [0, 11, -1, 2**70])
def test_bands_and_random_examples_are_those_of_smallest_hash(analysed, seed):
    plan = Plan(**{**PLAN.__dict__, "seed": seed})
    found = rows_of_table(analysed, plan)
    for feature, column in enumerate(activations(analysed).T):
        own = [row for row in found if row["feature"] == feature]
        for band in range(plan.n_bands):
            rows = [row["row"] for row in own if row["kind"] == "band" and row["band"] == band]
            assert rows == (expected_rows(column, feature, plan, band) if column.max() > 0 else [])
        rows = [row["row"] for row in own if row["kind"] == "random"]
        assert rows == expected_rows(column, feature, plan)


def test_a_value_on_an_edge_belongs_to_the_lower_band():
    """With a maximum of 1.25 the edges are the quarters that activations are."""
    analysed = subject(FakeSplit(60))
    split = split_of(analysed)
    split.inputs = np.clip(split.inputs, 0, None) * 0 + np.resize([0.25, 0.5, 0.75, 1, 1.25, 0], len(split.inputs))[
        :, None
    ].astype(np.float32)
    analysed.coder.W_enc[:], analysed.coder.b_enc[:] = 0, 0
    analysed.coder.W_enc[0, 0] = 1
    found = rows_of_table(analysed, PLAN)
    bands = {(row["activation"], row["band"]) for row in found if row["kind"] == "band"}
    assert bands == {(0.25, 0), (0.5, 1), (0.75, 2), (1.0, 3), (1.25, 4)}


def test_ranks_count_in_each_kind_and_band_and_rows_are_in_their_order(analysed):
    found = rows_of_table(analysed, PLAN)
    key = [
        (row["feature"], table.KINDS.index(row["kind"]), -1 if row["band"] is None else row["band"], row["rank"])
        for row in found
    ]
    assert key == sorted(key)
    for group in {entry[:3] for entry in key}:
        own = [row for entry, row in zip(key, found, strict=True) if entry[:3] == group]
        assert [row["rank"] for row in own] == list(range(len(own)))
        assert [(-row["activation"], row["row"]) for row in own] == sorted(
            (-row["activation"], row["row"]) for row in own
        )
    assert {row["kind"] for row in found if row["band"] is None} == {"top", "random"}


@pytest.mark.parametrize("missing", [(), [(1, 4), (1, 5), (7, 2)]])
def test_windows_show_the_activations_around_and_null_where_there_is_no_row(missing):
    split = FakeSplit(30, missing=missing, unit_rows=23)
    analysed = subject(split)
    acts = activations(analysed)
    plan = Plan(**{**PLAN.__dict__, "window_before": 2, "window_after": 3})
    found = rows_of_table(analysed, plan)
    assert {row["kind"] for row in found} == set(table.KINDS)
    for row in found:
        inside = range(max(row["position"] - 2, 0), min(row["position"] + 4, CONTEXT_LENGTH))
        expected = dict.fromkeys(inside)
        for index in np.flatnonzero(split.context == row["context"]):
            if split.position[index] in expected:
                expected[split.position[index]] = acts[index, row["feature"]]
        assert row["window_activations"] == list(expected.values())
        assert row["activation"] == acts[row["row"], row["feature"]]


def test_none_are_taken_where_none_are_wanted(analysed):
    plan = Plan(**{**PLAN.__dict__, "n_band_examples": 0, "n_random_examples": 0})
    assert {row["kind"] for row in rows_of_table(analysed, plan)} == {"top"}
    plan = Plan(**{**PLAN.__dict__, "n_band_examples": 0})
    assert {row["kind"] for row in rows_of_table(analysed, plan)} == {"top", "random"}
