from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tailrace.analysis.harvest.examples import TopExamples, rank_in_group
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.tables import examples as table
from tests.support.analysis_subject import CONTEXT_LENGTH, FakeCoder, FakeSplit, activations, split_of, subject


def strongest_by_brute_force(analysed, n):
    """For each feature: the (activation, row) of the n strongest contexts, ties to the earlier row."""
    acts, context = activations(analysed), split_of(analysed).context
    found = {}
    for feature in range(acts.shape[1]):
        per_context = []
        for one in np.unique(context):
            rows = np.flatnonzero(context == one)
            best = rows[np.argmax(acts[rows, feature])]  # argmax gives the first of equals
            if acts[best, feature] > 0:
                per_context.append((-acts[best, feature], int(best)))
        found[feature] = [(-negated, row) for negated, row in sorted(per_context)[:n]]
    return found


def rows_of_table(analysed, plan):
    harvest = gather(analysed, plan, [TopExamples])
    return [row for batch in table.compute(harvest, analysed, plan) for row in batch.to_pylist()]


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("block_rows", [7, 30, 1000])
def test_the_kept_examples_are_the_strongest_one_per_context_ties_by_row(n, block_rows):
    analysed = subject(FakeSplit(40, unit_rows=33))
    harvest = gather(analysed, Plan(n_examples=n, block_rows=block_rows), [TopExamples])
    kept = harvest[TopExamples].kept
    for feature, expected in strongest_by_brute_force(analysed, n).items():
        own = kept.feature == feature
        assert list(zip(kept.activation[own], kept.row[own], strict=True)) == expected
    assert len(np.unique(kept.activation)) < len(kept.activation)  # there were ties to decide


def test_a_dead_feature_has_no_example():
    analysed = subject()
    kept = gather(analysed, Plan(), [TopExamples])[TopExamples].kept
    assert analysed.coder.d_sae - 1 not in kept.feature
    assert len(kept.feature) > 0


class OneHot(FakeCoder):
    """Feature 0 reads input 0."""

    def __init__(self):
        super().__init__(d_in=1, d_out=1, d_sae=1)
        self.W_enc, self.b_enc = torch.ones(1, 1), torch.zeros(1)


def split_with(values):
    """One context whose positions 1 to 7 hold ``values``."""
    split = FakeSplit(1, d_in=1, d_out=1)
    split.inputs = np.array(values, np.float32)[:, None]
    return split


def test_a_window_shows_each_token_with_its_activation_and_null_where_no_row_was_kept():
    analysed = subject(split_with([1, 0, 5, 2, 0, 0, 0]), OneHot())
    (row,) = rows_of_table(analysed, Plan(n_examples=5, window_before=3, window_after=2))
    split = split_of(analysed)
    tokens = split.tokens[0]
    assert (row["feature"], row["rank"], row["activation"]) == (0, 0, 5.0)
    assert (row["row"], row["unit"], row["context"], row["position"]) == (2, 0, 0, 3)
    assert row["token_id"] == tokens[3]
    assert row["token"] == f"t{tokens[3]}"
    assert row["document"] == split.documents[0, 3]
    assert row["window_start"] == 0
    assert row["window_token_ids"] == tokens[0:6].tolist()
    assert row["window_tokens"] == [f"t{token}" for token in tokens[0:6]]
    assert row["window_activations"] == [None, 1.0, 0.0, 5.0, 2.0, 0.0]  # position 0 is BOS, which the cache left out


@pytest.mark.parametrize(
    ("place", "token"),
    [(3, "<0xE6><0x97>"), (4, "日"), (5, "t9")],  # 日 is E6 97 A5: its first two bytes, then the last
)
def test_a_character_split_over_tokens_stands_at_the_token_that_completes_it(place, token):
    values = [0] * 7
    values[place - 1] = 5  # the cache left position 0 out
    analysed = subject(split_with(values), OneHot())
    analysed = dataclasses.replace(analysed, vocabulary=[*analysed.vocabulary[:17], "<0xE6><0x97>", "<0xA5>"])
    split_of(analysed).tokens[0, 3:6] = [17, 18, 9]
    split_of(analysed).tokens[0, :3] = 0
    (row,) = rows_of_table(analysed, Plan(window_before=place - 1, window_after=5 - place))
    assert row["window_tokens"] == ["t0", "t0", "", "日", "t9"]
    assert row["token"] == token


@pytest.mark.parametrize(
    ("values", "start", "shown"),
    [
        ([9, 1, 0, 0, 0, 0, 0], 0, [None, 9.0, 1.0, 0.0]),  # position 1: only BOS lies before it
        ([0, 0, 0, 0, 0, 3, 9], 5, [0.0, 3.0, 9.0]),  # position 7 is the last
    ],
)
def test_a_window_ends_at_the_edges_of_its_context(values, start, shown):
    analysed = subject(split_with(values), OneHot())
    (row,) = rows_of_table(analysed, Plan(window_before=2, window_after=2))
    assert row["window_start"] == start
    assert row["window_activations"] == shown
    assert len(row["window_tokens"]) == len(shown)


def test_a_window_reaches_across_units():
    whole = rows_of_table(subject(FakeSplit(12, unit_rows=1000)), Plan())
    cut = rows_of_table(subject(FakeSplit(12, unit_rows=5)), Plan())
    assert [{**row, "unit": row["row"] // 5} for row in whole] == cut


def test_rows_left_out_in_mid_context_do_not_shift_the_window():
    split = FakeSplit(3, missing=[(1, 4), (1, 5)])
    analysed = subject(split)
    acts = activations(analysed)
    for row in rows_of_table(analysed, Plan(window_before=CONTEXT_LENGTH, window_after=CONTEXT_LENGTH)):
        expected = [None] * CONTEXT_LENGTH
        for index in np.flatnonzero(split.context == row["context"]):
            expected[split.position[index]] = acts[index, row["feature"]]
        assert row["window_activations"] == expected


def test_rank_counts_from_zero_in_each_run():
    assert rank_in_group(np.array([3, 3, 5, 7, 7, 7])).tolist() == [0, 1, 0, 0, 1, 2]
    assert rank_in_group(np.array([], np.int64)).tolist() == []
