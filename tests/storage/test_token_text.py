"""Tests of token texts whose characters are split over tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.analysis.tables import examples
from tailrace.analysis.tables.examples import WindowTexts
from tailrace.storage.token_text import has_bytes, join_characters, text_of_bytes


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (" café".encode(), " café"),
        (b"\xe6\x97", "<0xE6><0x97>"),
        (b" \xf0\x9f", " <0xF0><0x9F>"),
        (b"\x97\xe6\x9c\xac", "<0x97>本"),
        ("\N{REPLACEMENT CHARACTER}".encode(), "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_bytes_of_no_whole_character_are_named(data: bytes, text: str) -> None:
    assert text_of_bytes(data) == text
    assert has_bytes(text) == ("<0x" in text)


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["a", " b"], ["a", " b"]),
        # 日 is E6 97 A5, 語 is E8 AA 9E.
        (["<0xE6><0x97>", "<0xA5>", "本", "<0xE8>", "<0xAA>", "<0x9E>"], ["", "日", "本", "", "", "語"]),
        (["<0xA5>", "x", "<0xE8>"], ["<0xA5>", "x", "<0xE8>"]),  # cut off at both ends
        (["<0xE8>", " x", "<0xAA>"], ["<0xE8>", " x", "<0xAA>"]),  # another token in between
        (["<0xE6>", "<0x97><0xA5>!"], ["", "日!"]),
        (["日<0xE8>", "<0xAA><0x9E>"], ["日", "語"]),
        (["<0xE8>", "<0xE6>", "<0x97><0xA5>"], ["<0xE8>", "", "日"]),
        (["<0x41>", "<0xZZ>"], ["<0x41>", "<0xZZ>"]),  # no byte of a part of a character
    ],
)
def test_a_character_stands_at_the_token_that_completes_it(texts: list[str], joined: list[str]) -> None:
    assert join_characters(texts) == joined


_TEXT = st.text(st.sampled_from("a é本語🙂\n<x"), max_size=12)


@given(text=_TEXT, cuts=st.lists(st.integers(0, 40), max_size=8))
def test_however_a_text_is_cut_its_tokens_join_to_it(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    tokens = [text_of_bytes(data[start:stop]) for start, stop in pairwise(edges)]
    assert "".join(join_characters(tokens)) == text


def test_windows_are_joined_each_by_itself() -> None:
    texts = WindowTexts(["the", "<0xE6><0x97>", "<0xA5>", " x"])
    # The first window ends with the bytes that the second would complete.
    tokens, lengths = np.array([0, 1, 2, 3, 1, 2, 2, 0, 1, 2]), np.array([5, 3, 2])
    assert texts.of(tokens, lengths) == pa.array(
        ["the", "", "日", " x", "<0xE6><0x97>", "<0xA5>", "<0xA5>", "the", "", "日"]
    )


def test_runs_that_were_put_together_are_forgotten_before_they_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MOST_KEPT", 2)
    texts = WindowTexts(["the", "<0xE6><0x97>", "<0xA5>"])
    for tokens in ([1, 2], [1], [2], [1, 2], [2, 2], [1, 2]):
        made = texts.of(np.array(tokens), np.array([len(tokens)]))
        assert made == pa.array(join_characters([texts.vocabulary[one].as_py() for one in tokens]))
        assert len(texts._joined) <= 2


def test_windows_without_such_tokens_are_left_alone() -> None:
    texts = WindowTexts(["the", "<0xE6><0x97>"])
    assert texts.of(np.array([0, 0]), np.array([1, 1])) == pa.array(["the", "the"])
    assert texts.of(np.array([], np.int64), np.array([], np.int64)) == pa.array([], pa.string())
