"""Contexts on the grid of live mode: full batches for ever, nothing lost within a pass, continued from any batch."""

from __future__ import annotations

import numpy as np
import pytest

from tailrace.pipeline.live.contexts import ContextBatches, TextBatch, TextPosition
from tailrace.pipeline.live.heldout import count_listed, read_heldout_contexts
from tailrace.pipeline.text import packing
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.storage.errors import TextError
from tests.support.packing_streams import TokenDocuments, all_but_bos, as_json, contexts_of, make_source

LENGTHS = (7, 3, 11, 1, 0, 9, 5, 13, 2, 8)
DOCUMENTS = [[100 * index + token for token in range(length)] for index, length in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packer hand out the contexts of two documents at a time, so that batches cut through pieces."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 2)


def read(n: int, start=None, *, holdout="0", per_batch=3, heldout_rows=5, documents=DOCUMENTS, **options):
    targets = {"train": None, "heldout": heldout_rows}
    stream = TokenDocuments(documents)

    def open_source(state):
        return make_source(stream, holdout=holdout, targets=targets, state=state, row_mask=all_but_bos)

    batches = ContextBatches(open_source, per_batch, start, **options)
    return [next(batches) for _ in range(n)]


def one_pass(holdout: str = "0") -> list[list[int]]:
    source = make_source(DOCUMENTS, holdout=holdout, targets={"train": None, "heldout": 5}, row_mask=all_but_bos)
    return contexts_of(list(source))


def joined(batches: list[TextBatch]) -> list[list[int]]:
    return np.concatenate([batch.tokens for batch in batches]).tolist()


@pytest.mark.parametrize("holdout", ["0", "2,7", "0.3"])
def test_every_pass_gives_the_contexts_that_a_cache_would_hold(holdout: str) -> None:
    expected = one_pass(holdout)
    assert len(expected) > 12
    n_batches = 3 * len(expected) // 3
    assert joined(read(n_batches, holdout=holdout)) == expected * 3


def test_batches_are_full_and_numbered_through_all_passes() -> None:
    batches = read(20)
    assert [len(batch.tokens) for batch in batches] == [3] * 20
    assert [batch.position.context for batch in batches] == list(range(0, 60, 3))
    n_contexts = len(one_pass())
    assert [batch.position.text_pass for batch in batches] == [context // n_contexts for context in range(0, 60, 3)]


@pytest.mark.parametrize("holdout", ["0", "2,7", "0.3"])
@pytest.mark.parametrize("per_batch", [1, 3, 8])
def test_reading_goes_on_from_every_batch_as_if_it_had_not_stopped(holdout: str, per_batch: int) -> None:
    whole = read(20, holdout=holdout, per_batch=per_batch)
    for n, batch in enumerate(whole):
        position = TextPosition.from_json(as_json(batch.position.as_json()))
        resumed = read(20 - n, position, holdout=holdout, per_batch=per_batch)
        assert joined(resumed) == joined(whole[n:]), f"from batch {n}"
        assert [one.position.context for one in resumed] == [one.position.context for one in whole[n:]]
        assert [one.position.text_pass for one in resumed] == [one.position.text_pass for one in whole[n:]]


@pytest.mark.parametrize("holdout", ["0", "2,7", "0.3"])
def test_reading_may_stop_after_every_single_batch(holdout: str) -> None:
    chained, position = [], None
    for _ in range(20):
        batch, following = read(2, position, holdout=holdout)
        chained.append(batch)
        position = TextPosition.from_json(as_json(following.position.as_json()))
    assert joined(chained) == joined(read(20, holdout=holdout))


def test_resuming_does_not_read_the_text_from_its_beginning() -> None:
    position = read(6)[-1].position
    opened = []

    class Watched(TokenDocuments):
        def read_from(self, state):
            opened.append(0 if state is None else state["position"])
            return super().read_from(state)

    stream = Watched(DOCUMENTS)
    next(ContextBatches(lambda state: make_source(stream, state=state, row_mask=all_but_bos), 3, position))
    assert min(opened) >= 4


def test_a_text_shorter_than_the_buffer_is_refused_with_its_rows() -> None:
    n_rows = 3 * len(one_pass())
    read(20, smallest_pass=n_rows)
    with pytest.raises(
        TextError, match=rf"speeches: gives {n_rows} training rows in one pass, wanted at least {n_rows + 1}"
    ):
        read(20, smallest_pass=n_rows + 1, name="speeches")


def heldout_of(holdout: str, n_rows: int) -> set[int]:
    rule = HoldoutRule.parse(holdout, 0)
    source = make_source(DOCUMENTS, holdout=rule, targets={"train": None, "heldout": n_rows}, row_mask=all_but_bos)
    tokens, documents = read_heldout_contexts(source, rule, all_but_bos, n_rows, "speeches")
    assert tokens.shape == documents.shape
    return set(documents.ravel().tolist())


@pytest.mark.parametrize(("holdout", "n_rows"), [("2,7", 5), ("2,7", 1000), ("0.3", 5), ("0.3", 1000), ("1::3", 6)])
def test_no_document_is_both_held_out_and_trained_on(holdout: str, n_rows: int) -> None:
    held = heldout_of(holdout, n_rows)
    trained = np.concatenate([batch.documents for batch in read(40, holdout=holdout, heldout_rows=n_rows)])
    assert held
    assert not held & set(trained.ravel().tolist())


def test_listed_documents_are_read_no_further_than_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    read_batch = packing._read_batch

    def watched(reader):
        taken.append(reader.position)
        return read_batch(reader)

    monkeypatch.setattr(packing, "_read_batch", watched)
    held = heldout_of("0,2", 1000)
    assert held == {0, 2}
    assert max(taken) < 4, "documents 4 to 9 were not needed"


def test_listed_documents_are_counted_once_and_endless_lists_not_at_all() -> None:
    assert count_listed(HoldoutRule.parse("3,17,3,0:4:2")) == 4
    assert count_listed(HoldoutRule.parse("7::20")) is None
    assert count_listed(HoldoutRule.parse("0.01")) is None


def test_listed_documents_too_short_for_a_row_are_refused() -> None:
    with pytest.raises(TextError, match="speeches: its held-out documents give no row; name more or longer documents"):
        heldout_of("3", 5)
