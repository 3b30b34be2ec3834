"""What a dashboard's pages say, against hand-worked cases and brute force over the activations of made tables."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.analysis.dashboards.example_lines import (
    document_text,
    example_lines,
    passages,
    top_tokens,
    whole_characters,
)
from tailrace.analysis.dashboards.feature_index import TOKENS_SHOWN, feature_index, feature_passages, interests
from tailrace.analysis.dashboards.feature_pages import FeaturePages, connection_lists
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.glossary import TERMS, as_markdown
from tailrace.analysis.dashboards.histograms import (
    Axis,
    band_edges,
    bands_of,
    count_in_bands,
    estimate_bands,
    first_bin,
    page_histogram,
    shared_axis,
    sparkline,
)
from tailrace.analysis.dashboards.values import Vocabulary, rounded, rounded_list, significant, visible_token
from tailrace.analysis.harvest.histogram import EDGES, find_bins
from tests.support.dashboard_tables import CONTEXT, DEAD, DENSE, N_BANDS, WORDS, MadeTables, make_tables
from tests.support.paths import DOCS

COLUMNS_OF_THE_LIST = (
    *("frequency", "max", "mean", "is_dense", "sparks", "tokens", "promoted"),
    *("interest", "examples", "shares"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeTables:
    return make_tables(tmp_path_factory.mktemp("made") / "tables")


@pytest.fixture(scope="module")
def tables(made: MadeTables) -> FeatureTables:
    return FeatureTables(made.path)


def pages(tables: FeatureTables, features: list[int], window: int = 24) -> tuple[list[dict[str, Any]], list[str]]:
    vocabulary = Vocabulary()
    source = FeaturePages(tables, range(features[0], features[-1] + 1), window=window, n_bands=tables.n_bands)
    return source.records(features, vocabulary), vocabulary.texts


def test_numbers_keep_their_significant_digits() -> None:
    given = [123456.0, 0.000123456, -1.23456, 0.0, 1e-30, 9.9996]
    assert significant(given).tolist() == [123500.0, 0.0001235, -1.235, 0.0, 1e-30, 10.0]
    assert rounded_list([np.nan, np.inf, 2.0], 3) == [None, None, 2.0]
    assert rounded([1.23456, None, 7, "x"]) == [1.235, None, 7, "x"]


def test_rounding_is_that_of_printing() -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=2000) * 10.0 ** rng.integers(-8, 8, 2000)
    assert significant(given, 5).tolist() == [float(f"{value:.5g}") for value in given]


def test_bands_are_half_open_and_hold_every_active_row_once() -> None:
    activations = np.array([0.0, 0.5, 2.0, 2.0001, 4.0, 10.0, 10.0])
    assert band_edges(10.0, 5).tolist() == [0, 2, 4, 6, 8, 10]
    assert count_in_bands(activations, 10.0, 5).tolist() == [2, 2, 0, 0, 2]


def test_the_largest_activation_is_in_the_last_band_whatever_its_edge_rounds_to() -> None:
    rng = np.random.default_rng(1)
    for largest in rng.random(200).astype(np.float32):
        assert count_in_bands(np.array([largest]), float(largest), 7).tolist() == [0] * 6 + [1]


def test_estimated_bands_are_exact_where_edges_fall_on_bins() -> None:
    assert estimate_bands([4, 2, 1, 3], [0.0, 1.0, 2.0, 3.0, 4.0], 4.0, 2).tolist() == [6, 4]
    assert estimate_bands([4, 2], [0.0, 2.0, 4.0], 3.0, 3).tolist() == [2, 2, 2]  # the last bin ends at 3


def test_bands_say_whether_they_were_counted_or_estimated() -> None:
    histogram = ([1, 3], [1.0, 2.0, 4.0])
    stored = np.array([1.5, 2.0, 3.0, 3.5], np.float32)
    counted, estimated = bands_of(3.5, histogram, stored, 2), bands_of(3.5, histogram, stored[:3], 2)
    assert (counted.counts.tolist(), counted.is_exact) == ([1, 3], True)
    assert not estimated.is_exact
    assert estimated.counts.sum() == 4


def test_histograms_find_their_place_among_the_bins_of_all_features() -> None:
    for start in (0, 5, 300, len(EDGES) - 2):
        assert first_bin(EDGES[start : start + 2].tolist()) == start


def test_joined_bins_add_up() -> None:
    axis = Axis(first=10, last=16, n_groups=3)  # seven bins in groups of three
    assert axis.n_groups == 3
    assert axis.counts([1, 2, 3, 4], start=12).tolist() == [1, 9, 0]
    assert np.array_equal(axis.edges, EDGES[[10, 13, 16, 19]])


def test_a_page_histogram_is_a_count_of_activations_between_its_edges(made: MadeTables) -> None:
    values = made.activations[:, 7]
    values = values[values > 0]
    bins = np.bincount(find_bins(values))
    first = int(np.flatnonzero(bins)[0])
    found = page_histogram(bins[first:].tolist(), EDGES[first : len(bins) + 1].tolist())
    assert found is not None
    edges = Axis(first, len(bins) - 1, 40).edges
    assert found["edges"] == [float(f"{edge:.4g}") for edge in edges.tolist()]
    assert found["counts"] == [((values >= low) & (values < high)).sum() for low, high in pairwise(edges)]
    assert sum(found["counts"]) == len(values)
    assert page_histogram([], []) is None


def test_sparklines_show_that_a_bar_is_not_empty() -> None:
    assert sparkline(np.array([0, 1, 500, 1000])) == "01iz"
    assert shared_axis([[], []]) is None


def test_windows_are_cut_to_the_same_length_on_both_sides() -> None:
    table = pa.table(
        {
            "feature": pa.array([4, 4, 6], pa.int32()),
            "activation": pa.array([3.0, 2.0, 1.0], pa.float32()),
            "document": [0, 1, 2],
            "context": [0, 5, 9],
            "position": [3, 11, 0],
            "window_start": [0, 10, 0],
            "window_tokens": [["a", "b", "c", "d", "e", "f", "g"], ["x", "d", "y"], ["z"]],
            "window_activations": pa.array([[None, 0, 1, 3, 0, 0.5, 0], [0, 2, 0], [1]], pa.list_(pa.float32())),
        }
    )
    vocabulary = Vocabulary()
    first, none, last = example_lines(table, [4, 5, 6], 2, vocabulary)
    texts = [vocabulary.texts[index] for index in first["tokens"]]
    assert texts == ["b", "c", "d", "e", "f", "x", "d", "y"]
    assert (first["before"], first["length"]) == ([2, 1], [5, 3])
    assert dict(zip(first["fires"], first["values"], strict=True)) == {1: 1.0, 2: 3.0, 4: 0.5, 6: 2.0}
    assert first["unread"] == []
    assert (first["kind"], first["activation"]) == (["top", "top"], [3.0, 2.0])
    assert none["length"] == []
    assert (last["tokens"], last["position"]) == ([vocabulary.index_of("z")], [0])
    whole = example_lines(table, [4], 9, Vocabulary())[0]
    assert (whole["length"], whole["unread"]) == ([7, 3], [0])


def test_tokens_are_listed_by_how_often_they_are_among_the_strongest_examples() -> None:
    table = pa.table(
        {"feature": [0, 0, 0, 0, 2, 2], "kind": ["top"] * 5 + ["band"], "token": ["b", "a", "c", "a", "d", "d"]}
    )
    tokens, n_examples = top_tokens(table, [0, 1, 2])
    assert [list(own.items()) for own in tokens] == [[("a", 0.5), ("b", 0.25), ("c", 0.25)], [], [("d", 1.0)]]
    assert n_examples == [4, 0, 1]


def test_the_text_of_the_strongest_examples_is_searched() -> None:
    windows = [[" a", "\n", "b"], ["", "日", None], [" a", "\n", "b"], ["far"]]
    table = pa.table({"feature": [0, 0, 0, 2], "kind": ["top", "top", "top", "band"], "window_tokens": windows})
    assert passages(table, [0, 1, 2], 3) == ["a⏎b\n日", "", ""]
    assert passages(table, [0], 1) == ["a⏎b"]


def features_of(*rows: tuple[bool, bool, float, float, int]) -> pa.Table:
    names = ("is_dead", "is_dense", "max", "p50", "n_active")
    return pa.table({name: [row[at] for row in rows] for at, name in enumerate(names)})


def test_interest_is_the_product_that_the_glossary_says() -> None:
    live = (False, False, 8.0, 2.0, 50)
    table = features_of(live, live, (False, True, 8.0, 2.0, 50), (True, False, 0.0, 0.0, 0), live)
    tokens = [{" war": 0.5, "War": 0.25, " a": 0.25}, {"war": 1.0}, {"x": 1.0}, {}, {"y": 1.0}]
    found = interests(table, tokens, [2, 9, 9, 0, 1])
    concentrated, spread, support, documents, shared = 0.75, 2 / 3, 50 / 100, 2 / 3, 2
    assert found[0] == round(concentrated * spread * support * documents / shared**0.5, 4)
    assert found[1] == round(1.0 * spread * support * 1 / shared**0.5, 4)
    assert found[2:] == [None, None, None]  # dense; dead; examples of one document
    strong = interests(features_of((False, False, 1e6, 1.0, 10**6)), [{"z": 1.0}], [100])
    assert strong == [1.0]


def test_characters_that_tokens_share_are_joined_where_their_bytes_make_them() -> None:
    given = ["a", "<0xE6>", "<0x97><0xA5>", "<0xE6>", "b", "<0x97>", "<0xC3>", "<0xA9>"]
    assert whole_characters(given) == ["a", "", "日", "<0xE6>", "b", "<0x97>", "<0xC3>", "<0xA9>"]
    assert whole_characters(["<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>"]) == ["", "é", "", "é"]


def test_a_document_is_what_the_rows_keep_of_it_with_its_gaps(tmp_path: Path) -> None:
    made = make_tables(tmp_path / "tables", d_sae=8, parts={"rows", "activations"})
    rows = pq.read_table(made.path / "rows.parquet")
    # of document 1, contexts 4 to 7: without context 5, and without the third token of context 4
    kept = [row for row in range(rows.num_rows) if row // CONTEXT != 5 and row != 4 * CONTEXT + 2]
    pq.write_table(rows.take(kept), tmp_path / "rows.parquet")
    tables = FeatureTables(made.path)
    tables._checked["rows.parquet"] = tmp_path / "rows.parquet"
    found = document_text(tables, DENSE, 1, 4, 1)
    assert found is not None
    own = [row for row in kept if 4 * CONTEXT <= row < 8 * CONTEXT]
    assert found["tokens"] == [visible_token(text) for text in rows.take(own)["token"].to_pylist()]
    assert (found["here"], found["gaps"]) == (1, [2, CONTEXT - 1])
    active = {at: made.activations[row, DENSE] for at, row in enumerate(own) if made.activations[row, DENSE] > 0}
    assert found["values"] == {at: float(f"{value:.3g}") for at, value in active.items()}
    assert document_text(tables, DENSE, 1, 5, 0) is None
    assert document_text(tables, DENSE, 99, 4, 1) is None
    assert document_text(FeatureTables(make_tables(tmp_path / "bare", d_sae=8, parts=()).path), 5, 1, 4, 1) is None


def test_connections_are_split_by_rank_and_told_by_kind() -> None:
    empty = {"layer": None, "head": None, "site": None, "other": None, "token": None}
    rows = [
        empty | {"kind": "token", "rank": rank, "token": text, "weight": weight}
        for rank, text, weight in ((1, "b", -0.5), (0, "a", -0.25), (-2, "c", -1.0), (-1, "d", -2.0))
    ]
    rows += [
        empty | {"kind": "head", "rank": rank, "layer": layer, "head": 3, "weight": 1.0}
        for rank, layer in ((1, 0), (0, 2))
    ]
    rows += [
        empty | {"kind": "head_token", "rank": 0, "layer": layer, "head": 3, "token": "e", "weight": 4.0}
        for layer in (0, 2)
    ]
    rows.append(empty | {"kind": "feature", "rank": -1, "layer": 5, "site": "layer5", "other": 17, "weight": -3.0})
    vocabulary = Vocabulary()
    found = connection_lists(rows, vocabulary)
    named = [[vocabulary.texts[index], weight] for end in ("top", "bottom") for index, weight in found["tokens"][end]]
    assert named == [["a", -0.25], ["b", -0.5], ["d", -2.0], ["c", -1.0]]
    assert found["heads"] == [[2, 3, 1.0], [0, 3, 1.0]]
    assert [entry["layer"] for entry in found["head_tokens"]] == [2, 0]
    assert found["later"] == [{"layer": 5, "site": "layer5", "top": [], "bottom": [[17, -3.0]]}]


def test_tokens_that_occur_nowhere_in_the_text_are_left_out() -> None:
    empty = {"layer": None, "head": None, "site": None, "other": None}
    ids = enumerate((5, 6, 7))
    rows = [
        empty | {"kind": "token", "rank": rank, "token_id": one, "token": f"{one}", "weight": 1.0} for rank, one in ids
    ]
    vocabulary = Vocabulary()
    found = connection_lists(rows, vocabulary, frozenset({6}))["tokens"]
    assert (found["top"], found["n_absent"]) == ([[vocabulary.index_of("6"), 1.0]], 2)
    assert connection_lists(rows, vocabulary)["tokens"]["n_absent"] == 0


def test_statistics_and_bands_equal_a_count_over_all_rows(made: MadeTables, tables: FeatureTables) -> None:
    features = [0, 7, 33, 69]
    records, _ = pages(tables, features)
    for feature, record in zip(features, records, strict=True):
        values = made.activations[:, feature]
        largest = float(values.max())
        assert record["statistics"]["n_active"] == (values > 0).sum()
        assert record["statistics"]["max"] == float(f"{largest:.4g}")
        assert [band["band"] for band in record["bands"]] == [4, 3, 2, 1, 0]
        assert all(band["is_exact"] for band in record["bands"])
        counts = [
            int(((values > largest * band / N_BANDS) & (values <= largest * (band + 1) / N_BANDS)).sum())
            for band in range(N_BANDS)
        ]
        assert [band["rows"] for band in record["bands"]] == counts[::-1]


def test_examples_of_a_page_are_the_rows_of_the_table(made: MadeTables, tables: FeatureTables) -> None:
    (record,), texts = pages(tables, [12])
    examples = record["examples"]
    starts = np.concatenate([[0], np.cumsum(examples["length"])])
    values = dict(zip(examples["fires"], examples["values"], strict=True))
    for index, (context, position) in enumerate(zip(examples["context"], examples["position"], strict=True)):
        row = context * CONTEXT + position
        here = starts[index] + examples["before"][index]
        assert examples["activation"][index] == float(f"{made.activations[row, 12]:.4g}")
        assert values[here] == float(f"{made.activations[row, 12]:.3g}")
        assert texts[examples["tokens"][here]] in {visible_token(word) for word in WORDS}


def test_what_tables_lack_is_none_on_the_page(tmp_path: Path) -> None:
    bare = FeatureTables(make_tables(tmp_path / "bare", d_sae=8, parts=()).path)
    (record,), _ = pages(bare, [1])
    missing = ("bands", "coactive", "connections", "logits", "nearest", "positions")
    assert {name: record[name] for name in missing} == dict.fromkeys(missing)
    assert set(record["examples"]["kind"]) == {"top"}
    assert feature_index(bare, list(range(8)))["promoted"] is None


def test_a_dead_feature_has_a_page_without_examples(tables: FeatureTables) -> None:
    (record,), _ = pages(tables, [DEAD])
    assert record["statistics"]["is_dead"]
    assert record["examples"]["length"] == []
    assert (record["bands"], record["histogram"], record["statistics"]["max"]) == (None, None, None)


def test_the_index_has_a_value_per_feature_and_column(made: MadeTables, tables: FeatureTables) -> None:
    chosen = [2, DEAD, DENSE, 40]
    index = feature_index(tables, chosen)
    assert index["feature"] == chosen
    assert {len(index[name]) for name in COLUMNS_OF_THE_LIST} == {4}
    assert index["frequency"] == [float(f"{(made.activations[:, one] > 0).mean():.4g}") for one in chosen]
    assert index["is_dense"] == [0, 0, 1, 0]
    assert (index["tokens"][1], index["sparks"][1], index["max"][1]) == ([], "", None)
    assert all(len(own) <= TOKENS_SHOWN for own in index["tokens"])
    assert (index["interest"][1], index["interest"][2]) == (None, None)
    assert 0 < index["interest"][0] < 1
    assert [len(own) for own in index["shares"]] == [len(own) for own in index["tokens"]]
    texts = feature_passages(tables, chosen)["passages"]
    assert (len(texts), texts[1]) == (4, "")
    assert all("z" in spark for spark in (index["sparks"][0], index["sparks"][2]))


def test_the_glossary_of_the_docs_is_that_of_the_pages() -> None:
    wanted = "run: python -m tailrace.analysis.dashboards.glossary docs/glossary.md"
    assert (DOCS / "glossary.md").read_text().endswith(as_markdown()), wanted
    assert list(TERMS) == sorted(TERMS, key=str.lower)


def test_a_vocabulary_keeps_each_text_once() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.indices_of(pa.chunked_array([["a", "\n"], ["a"]])).tolist() == [0, 1, 0]
    assert vocabulary.index_of("⏎") == 1
    assert vocabulary.texts == ["a", "⏎"]
