from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from tailrace.analysis.harvest.histogram import QUANTILE_RELATIVE_ERROR, wilson_interval
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.table import accumulators
from tailrace.analysis.tables import TABLES, examples, features, layers
from tailrace.analysis.tables.features import WEIGHT_COLUMNS
from tests.support.analysis_subject import FakeCoder, FakeSplit, activations, split_of, subject

PLAN = Plan(n_examples=4, block_rows=15, activation_rows=420)


@pytest.fixture(scope="module")
def analysed():
    return subject(FakeSplit(60, unit_rows=50), FakeCoder(d_sae=12))


@pytest.fixture(scope="module")
def harvest(analysed):
    return gather(analysed, PLAN, accumulators(TABLES))


@pytest.fixture(scope="module")
def rows(analysed, harvest):
    return pa.Table.from_batches(features.compute(harvest, analysed, PLAN)).to_pylist()


def test_there_is_a_row_for_every_feature(analysed, rows):
    assert [row["feature"] for row in rows] == list(range(analysed.coder.d_sae))


def test_counts_and_moments_equal_brute_force(analysed, rows):
    acts = activations(analysed).astype(np.float64)
    for row, column in zip(rows, acts.T, strict=True):
        active = column[column > 0]
        assert row["n_active"] == len(active)
        assert row["frequency"] == len(active) / len(column)
        assert row["is_dense"] == (len(active) / len(column) > 0.1)
        assert row["is_dead"] == (len(active) == 0)
        if len(active):
            assert row["log10_frequency"] == np.log10(len(active) / len(column))
            assert row["mean"] == pytest.approx(active.mean(), rel=1e-12)
            assert row["std"] == pytest.approx(active.std(), rel=1e-9, abs=1e-7)
            assert row["max"] == active.max()


def test_the_interval_of_a_frequency_is_wilsons():
    low, high = wilson_interval(np.array([0, 1, 5, 10]), 10)
    # the textbook's values, to four digits
    assert low == pytest.approx([0, 0.0179, 0.2366, 0.7225], abs=5e-5)
    assert high == pytest.approx([0.2775, 0.4042, 0.7634, 1], abs=5e-5)


def test_every_row_has_the_interval_of_its_own_frequency(rows):
    for row in rows:
        low, high = wilson_interval(np.array([row["n_active"]]), 420)
        assert (row["frequency_low"], row["frequency_high"]) == (low[0], high[0])
        assert row["frequency_low"] <= row["frequency"] <= row["frequency_high"]


def test_the_profile_is_the_frequency_at_each_part_of_the_context(analysed, harvest, rows):
    acts, split = activations(analysed), split_of(analysed)
    edges = [float(edge) for edge in features.TABLE.facts(harvest, analysed, PLAN)["position_edges"].split()]
    assert edges == [part / 2 for part in range(17)]  # 8 positions in 16 parts: every other part is empty
    for row, column in zip(rows, acts.T, strict=True):
        for share, (low, high) in zip(row["position_frequency"], pairwise(edges), strict=True):
            inside = (split.position >= low) & (split.position < high)
            assert share == (float((column[inside] > 0).mean()) if inside.any() else None)
    assert all(row["position_frequency"][0] is None for row in rows)  # BOS, which the cache left out


def test_token_ids_are_counted_once_each(analysed, rows):
    split = split_of(analysed)
    tokens = split.tokens[split.context, split.position]
    for row, column in zip(rows, activations(analysed).T, strict=True):
        assert row["n_token_ids"] == len(set(tokens[column > 0].tolist()))
        assert row["token_id_share"] == row["n_token_ids"] / len(set(tokens.tolist()))


def test_without_activations_nothing_is_said_of_token_ids(analysed):
    plan = Plan(n_examples=1)
    harvest = gather(analysed, plan, features.TABLE.needs)
    table = pa.Table.from_batches(features.compute(harvest, analysed, plan))
    assert table["n_token_ids"].null_count == table["token_id_share"].null_count == table.num_rows


def test_percentiles_are_within_the_stated_error_of_the_nearest_rank(analysed, rows):
    for row, column in zip(rows, activations(analysed).T, strict=True):
        active = column[column > 0]
        for percent in (10, 50, 90, 99) if len(active) else ():
            exact = np.quantile(active, percent / 100, method="inverted_cdf")
            assert row[f"p{percent}"] == pytest.approx(exact, rel=QUANTILE_RELATIVE_ERROR)


def test_the_histogram_counts_every_active_row_between_its_own_edges(analysed, rows):
    for row, column in zip(rows, activations(analysed).T, strict=True):
        active = column[column > 0]
        counts, edges = np.array(row["histogram"]), np.array(row["histogram_edges"], np.float32)
        if len(active):
            assert len(edges) == len(counts) + 1
            inside = [(active >= low) & (active < high) for low, high in pairwise(edges)]
            assert counts.tolist() == [int(bin_.sum()) for bin_ in inside]
            assert counts[0] > 0
            assert counts[-1] > 0
            assert counts.sum() == len(active)


def test_a_dead_feature_has_null_statistics_and_its_weights(analysed, rows):
    dead = rows[-1]
    assert dead["is_dead"]
    assert dead["n_active"] == 0
    assert dead["histogram"] == dead["histogram_edges"] == []
    nulls = {"log10_frequency", "mean", "std", "max", "p10", "p50", "p90", "p99"}
    nulls |= {field.name for field in WEIGHT_COLUMNS if field.nullable}  # there is no model here
    assert {name for name, value in dead.items() if value is None} == nulls | {
        "top_token_id",
        "top_token",
        "top_token_share",
    }
    assert dead["encoder_bias"] == -1e4


def test_norms_are_those_of_the_weights(analysed, rows):
    coder = analysed.coder
    assert [row["decoder_norm"] for row in rows] == pytest.approx(np.linalg.norm(coder.W_dec.double().numpy(), axis=1))
    assert [row["encoder_norm"] for row in rows] == pytest.approx(np.linalg.norm(coder.W_enc.double().numpy(), axis=1))


def test_the_top_token_is_the_most_frequent_among_the_examples(analysed, harvest, rows):
    table = pa.Table.from_batches(examples.compute(harvest, analysed, PLAN)).to_pylist()
    for row in rows[:-1]:
        own = [example for example in table if example["feature"] == row["feature"] and example["kind"] == "top"]
        tokens = [example["token_id"] for example in own]
        counts = Counter(tokens)  # keeps the order of first appearance, which is the order of strength
        expected = max(counts, key=lambda token: counts[token])
        assert row["top_token_id"] == expected
        assert row["top_token"] == f"t{expected}"
        assert row["top_token_share"] == counts[expected] / len(tokens)


def test_the_layer_row_equals_brute_force(analysed, harvest):
    (row,) = pa.Table.from_batches(layers.compute(harvest, analysed, PLAN)).to_pylist()
    acts = activations(analysed)
    l0 = (acts > 0).sum(axis=1)
    outputs = split_of(analysed).outputs.astype(np.float64)
    error = ((outputs - acts @ analysed.coder.W_dec.numpy()) ** 2).sum()
    assert row["n_rows"] == len(acts) == 420
    assert row["l0_mean"] == pytest.approx(l0.mean(), rel=1e-12)
    for percent in (10, 50, 90, 99):
        assert row[f"l0_p{percent}"] == np.quantile(l0, percent / 100, method="inverted_cdf")
    assert row["l0_max"] == l0.max()
    assert row["fvu"] == pytest.approx(error / ((outputs - outputs.mean(axis=0)) ** 2).sum(), rel=1e-12)
    assert row["mean_squared_error"] == pytest.approx(error / len(acts), rel=1e-12)
    assert row["n_dead"] == int(((acts > 0).sum(axis=0) == 0).sum()) >= 1
    assert row["dead_fraction"] == row["n_dead"] / 12
    assert row["n_dense"] == int(((acts > 0).mean(axis=0) > 0.1).sum())


def test_the_fvu_is_null_where_the_outputs_do_not_vary():
    split = FakeSplit(3)
    split.outputs[:] = 2.0
    analysed = subject(split)
    harvest = gather(analysed, PLAN, accumulators([layers.TABLE]))
    (row,) = pa.Table.from_batches(layers.compute(harvest, analysed, PLAN)).to_pylist()
    assert row["fvu"] is None
