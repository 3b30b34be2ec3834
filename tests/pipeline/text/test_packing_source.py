from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tailrace.pipeline.text.packing
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import PackedContexts
from tailrace.storage.errors import TextError
from tests.support.packing_streams import (
    EOS,
    TokenDocuments,
    all_but_bos,
    as_json,
    assert_resumes_everywhere,
    contexts_of,
    make_source,
    packed_tokens,
    stream_tokens,
)

TWENTY = [[10 * d + i for i in range(d % 7)] for d in range(20)]

corpora = st.lists(
    st.lists(st.integers(0, 90), max_size=12).map(lambda tokens: [*tokens]), min_size=2, max_size=40
).flatmap(lambda documents: st.tuples(st.just(documents), st.permutations(range(len(documents)))))
rules = st.sampled_from(["0", "0.05", "0.2", "0.5", "1::3", "4,0:2", "3::5,7"])
row_targets = st.integers(1, 60)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches in a corpus of a few documents."""
    monkeypatch.setattr(tailrace.pipeline.text.packing, "BATCH_DOCUMENTS", 3)


def run(source):
    """Return the items, and whether the text was long enough for one context of each split."""
    items = []
    try:
        for item in source:
            items.append(item)
    except TextError as error:
        if "too short" not in str(error) and "no held-out context" not in str(error):
            raise
        return items, False
    return items, True


def test_training_stops_with_the_context_that_reaches_its_target():
    source = make_source(TWENTY, targets={"train": 7}, row_mask=all_but_bos)
    items = list(source)
    assert len(contexts_of(items)) == 3  # three rows in each context of four tokens: 3, 6, 9
    assert source.finished == "targets"
    assert source.counts["train"]["rows"] == 9


def test_without_a_target_the_whole_dataset_is_packed():
    source = make_source(TWENTY)
    items = list(source)
    n_stream = sum(len(document) + 1 for document in TWENTY if document)
    assert source.finished == "dataset"
    assert len(contexts_of(items)) == n_stream // 3
    assert source.counts["train"]["partial_tokens"] == n_stream % 3


def test_listed_documents_are_held_out_and_never_trained_on():
    items = list(make_source(TWENTY, holdout="6::7"))
    held = {document for document, _ in packed_tokens(items, "heldout")}
    trained = {document for document, _ in packed_tokens(items, "train")}
    assert held == {6, 13}
    assert not trained & {6, 13}


def test_one_document_is_held_out_however_small_the_share():
    items = list(make_source(TWENTY, holdout="0.000001", targets={"train": 30}))
    rule = HoldoutRule.parse("0.000001")
    expected = min(range(16), key=rule.chance)
    held = {document for document, _ in packed_tokens(items, "heldout")}
    assert held == {expected}


def test_held_out_rows_stop_at_their_target():
    documents = [[d] * 50 for d in range(20)]
    source = make_source(documents, holdout="0.5", targets={"train": 200, "heldout": 10})
    list(source)
    assert source.counts["heldout"]["rows"] == 12  # contexts of four: 4, 8, 12
    assert source.counts["heldout"]["documents"] == 1
    assert source.counts["heldout"]["partial_tokens"] == 51 - 9


def test_after_training_is_done_documents_are_passed_over_until_one_held_out_context():
    documents = [[d] * 3 for d in range(20)]
    source = make_source(documents, holdout="15", targets={"train": 4})
    items = list(source)
    assert contexts_of(items, "train") == [[99, 0, 0, 0]]
    assert contexts_of(items, "heldout") == [[99, 15, 15, 15]]
    assert source.counts["train"]["documents"] == 3  # the first batch; the others were not even tokenised


def test_documents_passed_over_are_trained_on_when_the_run_is_extended():
    documents = [[d] * 3 for d in range(20)]
    first = make_source(documents, holdout="15", targets={"train": 4})
    items = list(first)
    second = make_source(documents, holdout="15", state=as_json(first.state))
    items += list(second)
    expected = stream_tokens(documents, [d for d in range(20) if d != 15])
    assert packed_tokens(items, "train") == expected[: len(expected) // 3 * 3]


def test_tail_of_a_long_held_out_document_is_picked_up_when_the_run_is_extended():
    documents = [[d] * 50 for d in range(20)]
    first = make_source(documents, holdout="0.5", targets={"train": 200, "heldout": 10})
    items = list(first)
    second = make_source(documents, holdout="0.5", targets={"train": 600, "heldout": 70}, state=as_json(first.state))
    items += list(second)
    held = packed_tokens(items, "heldout")
    assert second.counts["heldout"]["rows"] == 72
    assert held == stream_tokens(documents, [*dict.fromkeys(document for document, _ in held)])[: len(held)]


def test_larger_target_takes_up_in_the_middle_of_a_document():
    documents = [[*range(90)]]
    first = make_source(documents, targets={"train": 8})
    items = list(first)
    items += list(make_source(documents, targets={"train": 20}, state=as_json(first.state)))
    assert [token for _, token in packed_tokens(items, "train")] == [*range(15)]


def test_resuming_opens_the_text_once_and_not_at_the_start():
    documents = TokenDocuments([[d] * 5 for d in range(20)])
    source = make_source(documents)
    states = [source.state for _ in source]
    again = TokenDocuments([[d] * 5 for d in range(20)])
    list(make_source(again, state=states[-1]))
    assert again.n_opened == 1
    assert states[-1]["lanes"]["train"]["documents"]["position"] >= 15


@pytest.mark.parametrize("holdout", ["0", "0.1", "0.5", "2::4"])
@pytest.mark.parametrize("train", [None, 1, 17, 40])
def test_resumes_exactly_at_every_state(holdout, train):
    documents = [[d] * (3 + d % 9) for d in range(30)]
    assert_resumes_everywhere(
        lambda state: make_source(
            documents, holdout=holdout, targets={"train": train}, state=state, row_mask=all_but_bos
        )
    )


@given(corpora, rules, st.none() | row_targets, st.none() | row_targets)
@settings(max_examples=150)
def test_every_token_comes_at_most_once_and_in_order(corpus, rule, train, heldout):
    documents, order = corpus
    targets = {"train": train, "heldout": heldout}
    items, _ = run(make_source(TokenDocuments(documents, order), holdout=rule, targets=targets))
    trained = packed_tokens(items, "train")
    held = packed_tokens(items, "heldout")
    held_documents = {document for document, _ in held}
    assert not held_documents & {document for document, _ in trained}
    assert [*held] == stream_tokens(documents, [d for d in order if d in held_documents])[: len(held)]
    candidates = stream_tokens(documents, [d for d in order if d not in held_documents])
    in_order = iter(candidates)
    assert all(pair in in_order for pair in trained)


@given(corpora, rules)
@settings(max_examples=100)
def test_tokens_are_conserved_over_the_whole_dataset(corpus, rule):
    documents, order = corpus
    source = make_source(TokenDocuments(documents, order), holdout=rule)
    items, _ = run(source)
    lanes = source.state["lanes"]
    trained = packed_tokens(items, "train", lanes["train"]["partial"])
    held = packed_tokens(items, "heldout", lanes["heldout"]["partial"])
    assert sorted(trained + held) == sorted(stream_tokens(documents, order))
    assert sum(count["documents"] for count in source.counts.values()) == len(documents)
    assert sum(count["partial_tokens"] for count in source.counts.values()) == sum(
        len(lane["partial"]["tokens"]) for lane in lanes.values()
    )


@given(corpora, rules, st.lists(row_targets, min_size=1, max_size=4), st.lists(row_targets, min_size=4, max_size=4))
@settings(max_examples=200)
def test_extending_picks_up_every_token_exactly_once(corpus, rule, trains, heldouts):
    """Whatever targets came before, a last run to the end of the text completes both splits without a repetition."""
    documents, order = corpus
    stages = [{"train": a, "heldout": b} for a, b in zip(sorted(trains), sorted(heldouts), strict=False)]
    state: Any = None
    items: list[PackedContexts] = []
    for targets in [*stages, {"train": None, "heldout": None}]:
        source = make_source(TokenDocuments(documents, order), holdout=rule, targets=targets, state=state)
        more, _ = run(source)
        items += more
        state = as_json(source.state)
    out = {split: packed_tokens(items, split, state["lanes"][split]["partial"]) for split in ("train", "heldout")}
    held = {document for document, _ in out["heldout"]}
    assert out["train"] == stream_tokens(documents, [d for d in order if d not in held])
    assert out["heldout"] == stream_tokens(documents, [d for d in order if d in held])


@given(corpora, rules, row_targets)
@settings(max_examples=100)
def test_extension_resumes_exactly_at_every_state(corpus, rule, train):
    documents, order = corpus

    def source(n_rows, state):
        return make_source(TokenDocuments(documents, order), holdout=rule, targets={"train": n_rows}, state=state)

    first = source(train, None)
    run(first)
    start = as_json(first.state)
    _, is_long_enough = run(source(3 * train, start))
    if is_long_enough:
        assert_resumes_everywhere(lambda state: source(3 * train, state or start))


def test_text_is_tokenised_in_batches():
    calls = []

    def tokenize(texts):
        calls.append(len(texts))
        return [[len(text)] for text in texts]

    class Texts(TokenDocuments):
        kind = "text"

        def __init__(self):
            super().__init__([[]] * 7)
            self.documents = [d._replace(text="x" * (d.index + 1), tokens=None) for d in self.documents]

    items = list(make_source(Texts(), tokenize=tokenize, context_length=3))
    assert calls == [3, 3, 1]
    assert contexts_of(items) == [[99, length, EOS] for length in range(1, 8)]


def test_single_document_cannot_be_both_held_out_and_trained_on():
    with pytest.raises(TextError, match="--holdout 0, or a smaller --text-unit"):
        list(make_source([[1] * 50], holdout="0.01"))


def test_text_too_short_for_one_context_is_refused():
    with pytest.raises(TextError, match="1 documents for training hold 3 tokens, and one context needs 7"):
        list(make_source([[1, 2]], context_length=8))


def test_list_that_names_no_document_of_the_dataset_is_refused_at_its_end():
    with pytest.raises(TextError, match="documents that exist \\(20 were read\\), or --holdout 0"):
        list(make_source(TWENTY, holdout="500"))


def test_documents_of_another_tokenizer_are_refused():
    with pytest.raises(TextError, match="document 1: holds token id 80"):
        list(make_source([[1], [80]], vocabulary_size=80))


def test_state_stays_small_while_a_long_document_is_handed_out():
    source = make_source([[1] * 10_000, [2] * 10_000], targets={"train": 8, "heldout": 8}, holdout="0.5")
    list(source)
    assert len(repr(source.state)) < 1500


def test_arrays_of_both_splits_have_one_shape():
    for item in make_source(TWENTY, holdout="1::3"):
        assert item.tokens.shape == item.documents.shape == (len(item.tokens), 4)
        assert np.all(item.tokens[:, 0] == 99)
