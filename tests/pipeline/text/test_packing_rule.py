import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.pipeline.text.packer import NOTHING, DocumentTokens, Packer, Partial, check_token_ids
from tailrace.pipeline.text.reading import Reading
from tailrace.pipeline.text.settings import RowFilter
from tailrace.storage.errors import SettingsError, TextError
from tests.support.packing_streams import contexts_of, documents_of, make_source

GOLDEN = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 15, 15]]


def test_context_is_bos_and_the_stream_of_documents_with_separators():
    items = list(make_source(GOLDEN))
    # stream: 1 2 3 E 4 5 6 7 E 8 9 10 11 12 13 14 E 15 15 15 E, cut into threes
    assert contexts_of(items) == [
        [99, 1, 2, 3],
        [99, 98, 4, 5],
        [99, 6, 7, 98],
        [99, 8, 9, 10],
        [99, 11, 12, 13],
        [99, 14, 98, 15],
        [99, 15, 15, 98],
    ]


def test_separator_belongs_to_the_document_it_ends_and_bos_to_the_next_token():
    items = list(make_source(GOLDEN))
    assert documents_of(items) == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],  # BOS takes the document of the separator after it
        [1, 1, 1, 1],
        [2, 2, 2, 2],
        [2, 2, 2, 2],
        [2, 2, 2, 3],
        [3, 3, 3, 3],
    ]


def test_context_is_handed_out_as_soon_as_it_is_full():
    packer = Packer(context_length=4, bos_token_id=99, separator_token_id=98)
    contexts, partial = packer.add(NOTHING, [DocumentTokens(5, np.array([1, 2], dtype=np.int32))])
    assert contexts.tokens.tolist() == [[99, 1, 2, 98]]
    assert partial.to_json() == {"tokens": [], "documents": []}


def test_separator_of_a_document_that_just_fits_does_not_follow_a_bos_that_is_the_same_token():
    packer = Packer(4, bos_token_id=7, separator_token_id=7, reading=Reading(separator_after_bos=False))
    documents = [DocumentTokens(n, np.array(tokens, np.int32)) for n, tokens in enumerate([[1, 2, 3], [4], [5, 6], []])]
    contexts, partial = packer.add(NOTHING, documents)
    assert contexts.tokens.tolist() == [[7, 1, 2, 3], [7, 4, 7, 5]]
    assert partial.to_json() == {"tokens": [6, 7], "documents": [2, 2]}
    before = Packer(4, bos_token_id=7, separator_token_id=7)
    assert before.add(NOTHING, documents)[0].tokens.tolist() == [[7, 1, 2, 3], [7, 7, 4, 7], [7, 5, 6, 7]]


@given(st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1), st.integers(3, 6), st.data())
def test_no_context_begins_with_one_token_twice_however_documents_are_cut(documents, context_length, data):
    packer = Packer(context_length, bos_token_id=7, separator_token_id=7, reading=Reading(separator_after_bos=False))
    partial, contexts = NOTHING, []
    rest = [DocumentTokens(n, np.array(tokens, np.int32)) for n, tokens in enumerate(documents)]
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        packed, partial = packer.add(partial, rest[:n])
        contexts += packed.tokens.tolist()
        rest = rest[n:]
    assert [row for row in contexts if row[1] == 7] == []
    kept = [token for row in contexts for token in row[1:] if token != 7] + [t for t in partial.tokens if t != 7]
    assert kept == [token for tokens in documents for token in tokens]


def test_left_over_tokens_wait_for_the_next_document():
    packer = Packer(context_length=4, bos_token_id=99, separator_token_id=98)
    _, partial = packer.add(NOTHING, [DocumentTokens(5, np.array([1], dtype=np.int32))])
    assert partial.to_json() == {"tokens": [1, 98], "documents": [5, 5]}
    restored = Partial.from_json(partial.to_json())
    contexts, partial = packer.add(restored, [DocumentTokens(6, np.array([2], dtype=np.int32))])
    assert contexts.tokens.tolist() == [[99, 1, 98, 2]]
    assert contexts.documents.tolist() == [[5, 5, 5, 6]]
    assert partial.to_json() == {"tokens": [98], "documents": [6]}


def test_token_arrays_have_the_types_of_the_format():
    item = next(iter(make_source(GOLDEN)))
    assert item.tokens.dtype == np.int32
    assert item.documents.dtype == np.uint32


def test_empty_document_leaves_no_token_but_is_counted():
    source = make_source([[1], [], [2]])
    # stream: 1 E 2 E
    assert contexts_of(list(source)) == [[99, 1, 98, 2]]
    assert source.counts["train"] == {
        "contexts": 1,
        "tokens": 4,
        "rows": 4,
        "documents": 3,
        "empty_documents": 1,
        "partial_tokens": 1,
    }


@pytest.mark.parametrize(
    ("tokens", "stripped"),
    [
        ([99, 1, 2, 98], [1, 2]),
        ([99, 99, 1, 98, 98], [99, 1, 98]),  # once only: what is left is the document's own
        ([1, 99, 98, 2], [1, 99, 98, 2]),
        ([99], []),
        ([98], []),
        ([], []),
    ],
)
def test_boundaries_that_the_data_brings_are_stripped_once(tokens, stripped):
    packer = Packer(context_length=4, bos_token_id=99, separator_token_id=98)
    assert packer.strip_boundaries(np.array(tokens, dtype=np.int32)).tolist() == stripped


def test_document_that_is_the_one_boundary_token_alone_is_empty():
    packer = Packer(context_length=4, bos_token_id=7, separator_token_id=7)
    assert packer.strip_boundaries(np.array([7], dtype=np.int32)).tolist() == []
    assert packer.strip_boundaries(np.array([7, 1, 7], dtype=np.int32)).tolist() == [1]


@pytest.mark.parametrize(("tokens", "vocabulary_size", "named"), [([3, -1], None, "-1"), ([3, 50], 50, "id 50")])
def test_token_ids_outside_the_vocabulary_are_refused_with_their_document(tokens, vocabulary_size, named):
    with pytest.raises(TextError, match=f"document 12: .*{named}"):
        check_token_ids(12, tokens, vocabulary_size)


def test_token_id_beyond_32_bits_is_refused():
    with pytest.raises(TextError, match="4294967296"):
        check_token_ids(0, [2**32], None)


def test_context_of_one_token_is_refused():
    with pytest.raises(SettingsError, match="at least 2"):
        make_source(GOLDEN, context_length=1)


def test_bos_is_no_row_unless_asked_for():
    tokens = np.array([[99, 5, 98, 7], [99, 98, 5, 6]])
    assert RowFilter().row_mask(4)(tokens).tolist() == [[False, True, True, True]] * 2
    assert RowFilter(exclude="none").row_mask(4)(tokens).all()


def test_special_tokens_and_early_positions_are_left_out():
    tokens = np.array([[99, 5, 98, 7], [99, 98, 5, 6]])
    special = RowFilter(exclude="special").row_mask(4, {98, 99})
    assert special(tokens).tolist() == [[False, True, False, True], [False, False, True, True]]
    late = RowFilter(first_position=3).row_mask(4)
    assert late(tokens).tolist() == [[False, False, False, True]] * 2


def test_row_filter_that_leaves_nothing_is_refused():
    with pytest.raises(SettingsError, match="at most 3"):
        RowFilter(first_position=4).row_mask(4)
    with pytest.raises(SettingsError, match="no special token"):
        RowFilter(exclude="special").row_mask(4)
