"""Text as people have it: every value is read as its file says, or refused with its row."""

from __future__ import annotations

import json
import re
import shutil
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache import verify
from tailrace.pipeline.cache.recorded_model import open_recorded_model
from tailrace.pipeline.live.batches import LiveBatches
from tailrace.pipeline.live.settings import FreshText, LiveSettings
from tailrace.pipeline.live.token_order import fresh_rows
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.tokenizer import ModelTokenizer
from tailrace.pipeline.text.packing import ContextSource
from tailrace.pipeline.text.reading import FIRST_RELEASE, choose_reading
from tailrace.pipeline.text.settings import CapturedContexts
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_writer import UnitBuffer
from tailrace.storage.errors import ModelError, SettingsError, TextError
from tests.support.cache_jobs import HERE, small_blocks, tree
from tests.support.cache_jobs import settings as cache_settings
from tests.support.paths import ROOT
from tests.support.quick import quick
from tests.support.text_files_written import open_text, texts_of, write_jsonl
from tests.support.tiny_models import save_tiny_model

TINY_LM = ROOT / "pipeline" / "samples" / "models" / "tiny-lm"
CASES = Path(__file__).parent / "cases"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=4,
)
texts = st.text(st.characters(codec="utf-8"), max_size=20)


def read_until_refused(path):
    read = []
    try:
        for document in open_text(path, column="text"):
            read.append(document.text)
    except TextError as error:
        return read, str(error)
    return read, None


# One number among the texts (case 01)


def test_number_among_texts_is_named_and_no_text_is_spelled_anew(monkeypatch):
    monkeypatch.setattr("tailrace.pipeline.text.stream.UNSHUFFLED_BLOCK", 1)
    folder = CASES / "01-json-one-number-rewrites-its-chunk" / "text"
    rows = [json.loads(line) for name in "ab" for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    read, refusal = read_until_refused(folder)
    assert read == [row["text"] for row in rows[:3]]
    assert "b.jsonl, row 2 (line 2): document 3 holds 1861 in column 'text', wanted text" in refusal


@given(
    rows=st.lists(st.tuples(texts, json_values), min_size=1, max_size=8),
    wrong=st.none() | json_values.filter(lambda value: not isinstance(value, str)),
    layout=st.sampled_from(["lines", "blank lines", "list", "indented list"]),
    cut=st.integers(0, 8),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_mixture_is_read_as_python_reads_it_or_refused_at_the_same_row(
    tmp_path_factory, rows, wrong, layout, cut, data
):
    folder = tmp_path_factory.mktemp("mixed")
    written = [{"text": text, "beside": beside} for text, beside in rows]
    at = data.draw(st.integers(1, len(rows)))
    if wrong is not None:
        written.insert(at, {"text": wrong, "beside": 1})
    # The first file has the first text, so that the column is one of texts.
    for name, part in (("a", written[: cut + 1]), ("b", written[cut + 1 :])):
        if layout.endswith("list"):
            content = json.dumps(part, indent=1 if layout == "indented list" else None)
        else:
            content = ("\n" if layout == "lines" else "\r\n\n").join(json.dumps(row) for row in part) + "\n"
        (folder / f"{name}.json").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailrace.pipeline.text.stream.UNSHUFFLED_BLOCK", 1)
        patch.setattr("tailrace.pipeline.text.json_rows._READ_BYTES", data.draw(st.integers(1, 30)))
        read, refusal = read_until_refused(folder)
    expected = [row["text"] for row in written]
    if wrong is None:
        assert (read, refusal) == (expected, None)
    else:
        assert read == expected[:at]
        assert f"document {at} holds" in refusal


any_line = st.one_of(
    st.text(st.characters(exclude_characters="\n\r"), max_size=12).map(lambda text: json.dumps({"text": text})),
    json_values.map(lambda value: json.dumps({"text": value})),
    json_values.map(lambda value: json.dumps({"beside": value})),
    json_values.map(json.dumps),
    st.text(st.characters(codec="ascii", exclude_characters="\n\r"), max_size=12),
)


def text_by_python(line):
    """Return the text that Python's own reader finds in a line; None if there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    text = row.get("text") if isinstance(row, dict) else row
    return text if isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text) else None


@given(
    lines=st.lists(any_line, max_size=12), first=texts, window=st.sampled_from([0, 16]), read_bytes=st.integers(1, 30)
)
@settings(max_examples=60, deadline=None)
def test_whatever_lines_hold_good_rows_are_read_and_the_others_keep_their_index(
    tmp_path_factory, lines, first, window, read_bytes
):
    written = [json.dumps({"text": first}), *(line for line in lines if line.strip())]
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text("\n".join(written))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailrace.pipeline.text.json_rows._READ_BYTES", read_bytes)
        skipping = open_text(path, column="text", on_bad_row="skip", shuffle_window=window)
        found = sorted((document.index, document.text) for document in skipping if document.problem is None)
        bad = {document.index for document in skipping if document.problem is not None}
        refusal = read_until_refused(path)[1]
    expected = [text_by_python(line) for line in written]
    assert found == [(index, text) for index, text in enumerate(expected) if text is not None]
    assert bad == {index for index, text in enumerate(expected) if text is None}
    assert (refusal is None) == (not bad)
    if refusal is not None:
        assert f"document {min(bad)} " in refusal


def test_text_that_looks_like_a_date_stays_as_it_is(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "2020-01-01"}, {"text": "2020-01-01 10:00:00"}])
    assert texts_of(open_text(tmp_path)) == ["2020-01-01", "2020-01-01 10:00:00"]


def test_state_of_an_older_cache_goes_on_at_its_document(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(20)])
    shuffled = open_text(tmp_path, shuffle_window=16)
    expected = list(shuffled)[16:]
    # As `datasets` 5.2 writes its state after 16 of these documents.
    arrow = {"shard_idx": 0, "shard_example_idx": 20, "type": "ArrowExamplesIterable"}
    rebatched = {
        "examples_iterable": arrow,
        "previous_state": {**arrow, "shard_example_idx": 0},
        "batch_idx": 16,
        "num_chunks_since_previous_state": 16,
        "cropped_chunk_length": 0,
        "type": "RebatchedArrowExamplesIterable",
    }
    examples = {"examples_iterable": rebatched, "epoch": 0}
    state = {"examples": examples, "window": 1, "first_index": 16, "position": 0}
    assert list(shuffled.read_from(state)) == expected


# Columns that nobody reads (case 20)


def test_column_that_is_not_read_may_hold_anything():
    folder = CASES / "20-a-column-that-is-not-read-stops-the-reading" / "text"
    rows = [json.loads(line) for name in "ab" for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert texts_of(open_text(folder)) == [row["text"] for row in rows]
    assert len(rows) == 4


# Hidden folders (case 33)


def test_hidden_folders_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "new"}])
    for hidden in (".ipynb_checkpoints", "__MACOSX", ".git/deep"):
        (tmp_path / hidden).mkdir(parents=True)
        write_jsonl(tmp_path / hidden / "a.jsonl", [{"text": "old"}])
    assert texts_of(open_text(tmp_path)) == ["new"]


def test_what_an_archiver_left_beside_the_files_is_left_out_of_a_pattern(tmp_path):
    for folder in ("a", "__MACOSX/a", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        write_jsonl(tmp_path / folder / "a.jsonl", [{"text": folder}])
    write_jsonl(tmp_path / "a" / "._b.jsonl", [{"text": "hidden"}])
    assert texts_of(open_text(tmp_path / "**" / "*.jsonl")) == ["a"]
    assert texts_of(open_text(tmp_path / "__MACOSX" / "*" / "*.jsonl")) == ["__MACOSX/a"]


# Files that tell of a dataset


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("pattern", ["", "*.*[lts]*"])
def test_files_that_tell_of_a_dataset_are_left_out_and_named(tmp_path, caplog, suffix, pattern):
    rows = Dataset.from_dict({"text": ["a"]})
    path = tmp_path / f"train{suffix}"
    {".jsonl": rows.to_json, ".parquet": rows.to_parquet, ".txt": lambda path: path.write_text("a")}[suffix](path)
    for name in ("config.json", "dataset_infos.json", "model.safetensors.index.json", "README.txt", "LICENSE.txt"):
        (tmp_path / name).write_text('{"text": "of the dataset"}')
    assert texts_of(open_text(tmp_path / pattern)) == ["a"]
    assert "left out by their names, as no documents: " in caplog.text
    assert texts_of(open_text(tmp_path / "config.json")) == ["of the dataset"]


# A folder of Dataset.save_to_disk (case 32)


@pytest.mark.parametrize("asked", ["saved", "."])
def test_folder_of_save_to_disk_is_refused_with_what_to_do(tmp_path, asked):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(TextError, match=r"saved is a folder of Dataset\.save_to_disk.*to_parquet"):
        open_text(tmp_path / asked, column="description")


# A byte order mark (case 34)


def test_byte_order_mark_is_no_text():
    folder = CASES / "34-byte-order-mark-becomes-tokens" / "text"
    texts = [(folder / name).read_text(encoding="utf-8-sig") for name in ("a.txt", "b.txt")]
    assert (folder / "a.txt").read_bytes().startswith(b"\xef\xbb\xbf")
    assert texts_of(open_text(folder)) == texts


def test_byte_order_mark_before_json_is_no_text(tmp_path):
    for name, content in (("a.json", '{"text": "a"}\n'), ("b.json", '[{"text": "b"}]')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert texts_of(open_text(tmp_path)) == ["a", "b"]


# Rows that are no documents (case 22)

BAD_LINES = {
    '{"text": null}': "holds nothing (null) in column 'text', wanted text",
    '{"body": "b"}': "holds nothing (null) in column 'text', wanted text",
    '{"text": 5}': "holds 5 in column 'text', wanted text",
    '{"text": ["a"]}': "holds a list with 'a' in column 'text', wanted text",
    '{"text": "half \\ud83d"}': r"holds half a character ('\ud83d' at 5), wanted text",
    '{"text": "cut': "cannot be read as JSON (Unterminated string starting at: line 1 column 10 (char 9))",
    "\xff": "cannot be read as JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
}


def write_lines(path, lines):
    path.write_bytes(b"".join(line.encode("latin-1") + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_row_stops_the_reading_and_is_passed_over_if_asked_for(tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "a"}', "", line, '{"text": "b"}'])
    with pytest.raises(TextError) as refused:
        list(open_text(path))
    said = f"{path}, row 2 (line 3): document 1 {BAD_LINES[line]}. "
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith("--on-bad-row skip")
    documents = list(open_text(path, on_bad_row="skip"))
    assert [(document.index, document.text) for document in documents] == [(0, "a"), (1, None), (2, "b")]
    assert [document.problem for document in documents] == [None, f"a.jsonl, row 2 (line 3): {BAD_LINES[line]}", None]


@pytest.mark.parametrize("value", ["null", "[1, null]", '[1, "x"]', "5"])
def test_token_list_that_is_none_is_a_bad_row(tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", ['{"tokens": [1, 2]}', f'{{"tokens": {value}}}', '{"tokens": [3]}'])
    with pytest.raises(TextError, match=r"a.jsonl, row 2 .line 2.: document 1 holds .* wanted a list of whole numbers"):
        list(open_text(path))
    assert [document.tokens for document in open_text(path, on_bad_row="skip")] == [[1, 2], None, [3]]


def test_null_of_a_parquet_file_is_a_bad_row(tmp_path):
    Dataset.from_dict({"text": ["a", None, "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TextError, match=r"a.parquet: document 1 holds nothing .null. in column 'text'"):
        list(open_text(tmp_path))
    (bad,) = [document.problem for document in open_text(tmp_path, on_bad_row="skip") if document.problem]
    assert bad == "a.parquet: holds nothing (null) in column 'text', wanted text"


def test_rows_passed_over_keep_their_index_and_are_recorded(tmp_path):
    lines = [json.dumps({"text": " ".join(["the people of the states"] * 3)})] * 40
    for at in (6, 20, 33):
        lines[at] = '{"text": null}'
    chosen = cache_settings(
        dataset=str(write_lines(tmp_path / "text.jsonl", lines)), tokens=100, holdout="3", shuffle_window=0
    )
    with pytest.raises(TextError, match=r"text.jsonl, row 7 .line 7.: document 6 holds nothing .*--on-bad-row skip"):
        cache.run(chosen, output=tmp_path / "made", **HERE)
    # The same output: what to do at a bad row is no part of the request.
    skipping = chosen.model_copy(update={"on_bad_row": "skip"})
    first = cache.run(skipping, output=tmp_path / "made", **HERE)
    reason = "holds nothing (null) in column 'text', wanted text"
    recorded = [f"text.jsonl, row {row} (line {row}): {reason}" for row in (7, 21, 34)]
    assert first.cache.manifest.packing["bad_rows"] == recorded
    assert first.cache.manifest.splits["train"].counts["bad_rows"] == 3
    assert first.cache.manifest.splits["train"].counts["empty_documents"] == 0
    assert first.warnings[0].startswith("3 rows were no documents and passed over:\n  text.jsonl, row 7 (line 7)")
    with pytest.raises(TextError, match=r"document 6 holds nothing"):
        cache.extend(tmp_path / "made", "all", **HERE)
    grown = cache.extend(tmp_path / "made", "all", on_bad_row="skip", **HERE).cache
    train = grown.split("train")
    documents = train.context_documents(np.arange(train.n_contexts))
    assert set(documents.ravel().tolist()) == set(range(40)) - {3, 6, 20, 33}
    assert grown.manifest.packing["bad_rows"] == recorded
    assert open_cache(tmp_path / "made").manifest.splits["train"].counts["bad_rows"] == 3


# Columns that say which ids are text (case 09)


def tokens_of(path, **settings):
    return [document.tokens for document in open_text(path, **settings)]


PADDED = [
    {"input_ids": [0, 101, 102, 103, 3, 3, 3, 3], "attention_mask": [1, 1, 1, 1, 0, 0, 0, 0]},
    {"input_ids": [0, 111, 112, 113, 114, 3, 3, 3], "attention_mask": [1, 1, 1, 1, 1, 0, 0, 0]},
    {"input_ids": [3, 3, 3, 0, 121, 122, 123, 124], "attention_mask": [0, 0, 0, 1, 1, 1, 1, 1]},
]
UNPADDED = [[0, 101, 102, 103], [0, 111, 112, 113, 114], [0, 121, 122, 123, 124]]


@pytest.mark.parametrize("column", [None, "input_ids"])
def test_ids_that_the_attention_mask_leaves_out_are_no_text(tmp_path, column):
    assert tokens_of(write_jsonl(tmp_path / "a.jsonl", PADDED), column=column) == UNPADDED
    Dataset.from_list(PADDED).to_parquet(tmp_path / "a.parquet")
    assert tokens_of(tmp_path / "a.parquet", column=column) == UNPADDED


def test_padding_becomes_no_row(tmp_path):
    rows = [{"input_ids": [1, *range(10, 14), 3, 3, 3], "attention_mask": [1] * 5 + [0] * 3}] * 20
    chosen = cache_settings(
        dataset=str(write_jsonl(tmp_path / "a.jsonl", rows)), tokens="all", holdout="0", shuffle_window=0
    )
    made = cache.run(chosen, output=tmp_path / "made", **HERE).cache
    tokens = made.split("train").context_tokens(np.arange(2))
    stream = [10, 11, 12, 13, 1] * 6  # id 1 is BOS and separator
    assert tokens.tolist() == [[1, *stream[:15]], [1, *stream[15:]]]
    assert made.manifest.packing["masks"] == ["attention_mask"]


def test_special_tokens_that_a_mask_names_are_left_out_at_either_end(tmp_path):
    rows = [
        {"tokens": [7, 20, 21, 8, 3, 3], "special_tokens_mask": [1, 0, 0, 1, 1, 1]},
        {"tokens": [7, 30, 8, 7, 31, 8], "special_tokens_mask": [1, 0, 1, 1, 0, 1]},
        {"tokens": [7, 8, 3, 3, 3, 3], "special_tokens_mask": [1, 1, 1, 1, 1, 1]},
    ]
    assert tokens_of(write_jsonl(tmp_path / "a.jsonl", rows)) == [[20, 21], [30, 8, 7, 31], []]


@pytest.mark.parametrize("side", ["left", "right"])
def test_length_leaves_padding_out_on_the_side_where_it_is(tmp_path, side):
    texts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9]]
    filled = [([0] * (4 - len(ids)) + ids if side == "left" else ids + [0] * (4 - len(ids))) for ids in texts]
    rows = [{"input_ids": ids, "length": len(text)} for ids, text in zip(filled, texts, strict=True)]
    assert tokens_of(write_jsonl(tmp_path / "a.jsonl", rows)) == texts


def test_length_of_something_else_is_left_alone(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "length": 17}, {"input_ids": [8, 9], "length": 1}]
    assert tokens_of(write_jsonl(tmp_path / "a.jsonl", rows)) == [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"holds 2 ids and \[1\] in column 'attention_mask', wanted 0 or 1",
        ),
        ({"input_ids": [5, 6], "attention_mask": None}, r"holds 2 ids and nothing .null. in column 'attention_mask'"),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, r"holds 2 ids and \[1, 2\] in column 'attention_mask'"),
    ],
)
def test_mask_that_does_not_fit_its_ids_is_refused(tmp_path, row, said):
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2], "attention_mask": [1, 1]}, row])
    with pytest.raises(TextError, match=f"row 2 .line 2.: document 1 {said}"):
        list(open_text(path))
    assert tokens_of(path, on_bad_row="skip") == [[1, 2], None]


def test_length_that_does_not_say_which_ids_are_text_is_refused(tmp_path):
    rows = [{"input_ids": [1, 2, 3, 4], "length": 4}] * 20 + [{"input_ids": [1, 2, 0, 0], "length": 2}]
    with pytest.raises(TextError, match=r"document 20 holds 4 ids and 2 in column 'length', and it is not clear"):
        list(open_text(write_jsonl(tmp_path / "a.jsonl", rows)))


# Contexts made beforehand (case 11)


def read_contexts(path, *, context_length=8, bos=0, separator=0, **changes):
    """Return the contexts that these rows become, and what is recorded of how they were read."""
    documents = open_text(path, **{name: changes.pop(name) for name in ("on_bad_row", "column") if name in changes})
    chosen = CapturedContexts(context_length=context_length, holdout="0", **changes)
    model: Any = SimpleNamespace(
        bos_token_id=bos,
        separator_token_id=separator,
        special_token_ids=(bos, separator),
        d_vocab=1000,
        max_context_length=64,
        tokenize=lambda texts, is_markup: [[len(word) for word in text.split()] for text in texts],
    )
    source = ContextSource.of(chosen, model, documents, {"train": None})
    contexts = [row for piece in source for row in piece.tokens.tolist()]
    return contexts, source


MADE = [[0, *range(start, start + 7)] for start in range(100, 160, 10)]


@pytest.mark.parametrize("rows", [MADE, [row[1:] for row in MADE]], ids=["with BOS", "without BOS"])
def test_contexts_made_beforehand_stay_as_they_are(tmp_path, rows):
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": row} for row in rows])
    contexts, source = read_contexts(path)
    assert contexts == MADE
    assert source.counts["train"]["partial_tokens"] == 0


def test_row_that_is_no_context_among_contexts_is_refused(tmp_path):
    rows = [{"input_ids": row} for row in [*MADE * 4, [0, 1, 2], [9, *range(7)], MADE[0]]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        TextError, match=r"document 24 has 3 ids, wanted 8 .*--on-bad-row skip; .*--token-rows documents"
    ):
        read_contexts(path)
    contexts, source = read_contexts(path, on_bad_row="skip")
    assert contexts == [*MADE * 4, MADE[0]]
    assert source.first_problems == [
        "document 24: has 3 ids, wanted 8 as in the first rows, which are contexts",
        "document 25: begins with id 9, wanted the BOS 0 as in the first rows",
    ]


def test_long_documents_cut_in_rows_get_no_separator_for_each_row(tmp_path, caplog):
    stream = list(range(100, 148))
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": stream[at : at + 12]} for at in range(0, 48, 12)])
    contexts, _ = read_contexts(path, context_length=9)
    assert contexts == [[0, *stream[at : at + 8]] for at in range(0, 48, 8)]
    assert "every row has 12 ids, so rows are pieces of longer text" in caplog.text
    assert read_contexts(path, context_length=9, token_rows="documents")[0][1] == [0, *stream[8:12], 0, *stream[12:15]]


def test_pieces_lose_the_bos_that_all_of_them_have(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": row} for row in MADE])
    contexts, _ = read_contexts(path, context_length=4)
    assert [token for row in contexts for token in row[1:]] == [token for row in MADE for token in row[1:]]


def test_rows_of_one_length_below_a_context_are_documents_unless_said_otherwise(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": [10, 11, 12]}] * 6)
    assert read_contexts(path, separator=9)[0][0] == [0, 10, 11, 12, 9, 10, 11, 12]
    assert "pass --token-rows pieces, or --context-length 4" in caplog.text
    assert read_contexts(path, separator=9, token_rows="pieces")[0][0] == [0, 10, 11, 12, 10, 11, 12, 10]


def test_what_rows_are_is_recorded_and_an_older_cache_keeps_its_way(tmp_path):
    rows = [{"input_ids": [1, *range(10, 25)]}] * 80
    chosen = cache_settings(
        dataset=str(write_jsonl(tmp_path / "a.jsonl", rows)), tokens=600, holdout="0", shuffle_window=0
    )
    made = cache.run(chosen, output=tmp_path / "made", **HERE).cache
    assert (
        made.split("train").context_tokens(np.arange(made.split("train").n_contexts)).tolist()
        == [rows[0]["input_ids"]] * 40
    )
    assert made.manifest.packing["token_rows"] == "contexts"
    documents, no_model = open_text(tmp_path / "a.jsonl"), cast(LanguageModel, None)
    older = {"context_length": 16, "bos_token_id": 1}
    assert choose_reading(chosen, no_model, documents, older) == FIRST_RELEASE
    again = choose_reading(chosen, no_model, documents, made.manifest.packing)
    assert again == FIRST_RELEASE._replace(token_rows="contexts", rows_begin_with_bos=True)
    assert "token_rows" not in made.manifest.request


# Token ids beside text (case 25)


def test_ids_of_another_tokenizer_beside_text_are_refused(tmp_path, caplog):
    rows = [{"text": "The law of the land", "input_ids": [50, 51, 52]}, {"text": "The states", "input_ids": [60, 61]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(TextError) as refused:
        read_contexts(path)
    assert str(refused.value) == (
        f"{path}: document 0 has ids in column 'input_ids' that this model's tokenizer does not make of the text in "
        "column 'text': they begin 50 51 52, wanted 3 3 2 3 4. Another tokenizer made them: pass --column text to read "
        "the text, or --column input_ids to read these ids all the same"
    )
    assert "reading column 'input_ids'; pass --column to read text" in caplog.text
    assert read_contexts(path, column="input_ids", context_length=4)[0][0] == [0, 50, 51, 52]
    assert read_contexts(path, column="text", context_length=6)[0][0] == [0, 3, 3, 2, 3, 4]


@pytest.mark.parametrize("ids", [[3, 3, 2, 3, 4], [0, 3, 3, 2, 3, 4, 0], [0, 3, 3, 2]])
def test_ids_that_the_tokenizer_makes_of_the_text_are_read(tmp_path, ids):
    rows = [{"text": "", "input_ids": [0]}, {"text": "The law of the land", "input_ids": ids}] * 3
    contexts, _ = read_contexts(write_jsonl(tmp_path / "a.jsonl", rows), context_length=4)
    assert contexts[0] == [0, 3, 3, 2]


# Special tokens spelled in text (case 24)


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's: byte-level BPE, whose only special token is <|endoftext|>."""
    return ModelTokenizer(AutoTokenizer.from_pretrained(TINY_LM), name="tiny-lm", d_vocab=4096)


SPELLED = "ends with <|endoftext|> and goes on"


def test_name_of_a_special_token_in_a_text_is_letters_unless_the_text_is_markup(tokenizer):
    as_text, as_markup = (tokenizer.tokenize([SPELLED], is_markup=is_markup)[0] for is_markup in (False, True))
    vocabulary = tokenizer.vocabulary()
    assert "".join(vocabulary[token] for token in as_text) == SPELLED
    assert 0 not in as_text
    assert as_markup.count(0) == 1
    plain = ["nothing of this kind", " < | endoftext > ", "x\n\n y"]
    assert tokenizer.tokenize(plain, is_markup=False) == tokenizer.tokenize(plain, is_markup=True)


@pytest.mark.slow
def test_texts_are_cached_as_letters_by_default_and_older_caches_stay_as_they_were(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": SPELLED}] * 40)
    chosen = cache_settings(
        model=str(TINY_LM), dataset=str(path), tokens=100, holdout="0", shuffle_window=0, layers="0"
    )
    as_text, as_markup = (tokenizer.tokenize([SPELLED], is_markup=is_markup)[0] for is_markup in (False, True))
    tokens = {}
    for name, changes in {"new": {}, "asked": {"special_tokens": "markup"}}.items():
        asked = chosen.model_copy(update=changes)
        made = cache.run(asked, output=tmp_path / name, **HERE).cache
        assert made.manifest.packing.get("special_tokens") == (None if changes else "text")
        assert made.manifest.request.get("special_tokens") == changes.get("special_tokens")
        cache.extend(tmp_path / name, 300, **HERE)
        train = open_cache(tmp_path / name).split("train")
        tokens[name] = train.context_tokens(np.arange(train.n_contexts))[:, 1:].ravel().tolist()
    for name, ids in (("new", as_text), ("asked", as_markup)):
        assert (
            tokens[name]
            == [*ids, 0] * (len(tokens[name]) // (len(ids) + 1)) + [*ids, 0][: len(tokens[name]) % (len(ids) + 1)]
        )
    # What an older release recorded has neither key, and means markup.
    documents, no_model = open_text(path), cast(LanguageModel, None)
    assert choose_reading(chosen, no_model, documents, {"context_length": 16}).special_tokens == "markup"


# Tokens that the model has no embedding for (case 23)


def save_model_with_a_token_too_many(path):
    save_tiny_model(path, vocabulary=["the", "law", "pads", "with"], n_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    return path


def test_token_without_an_embedding_is_letters_by_default_and_said_before_anything_is_read(tmp_path, caplog):
    texts = ["the law"] * 20 + ["pads with [PAD]"] + ["the law"] * 20
    chosen = cache_settings(
        model=str(save_model_with_a_token_too_many(tmp_path / "model")),
        dataset=str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])),
        tokens="all",
        holdout="0",
        shuffle_window=0,
        context_length=8,
    )
    made = cache.run(chosen, output=tmp_path / "made", **HERE).cache
    assert made.split("train").context_tokens(np.arange(made.split("train").n_contexts)).max() < 6
    assert "makes 1 token that it has no embedding for, '[PAD]' (id 6) first; its ids are 0 to 5" in caplog.text
    with pytest.raises(TextError, match=r"document 20: the tokenizer reads token 6 .*pass --special-tokens text"):
        cache.run(chosen.model_copy(update={"special_tokens": "markup"}), output=tmp_path / "markup", **HERE)


# A model without a tokenizer


def test_model_without_a_tokenizer_caches_token_ids(tmp_path):
    model = save_tiny_model(tmp_path / "model", n_layers=1)
    rows = [{"tokens": [*range(10, 10 + n)]} for n in range(5, 45)]
    given = {"dataset": str(write_jsonl(tmp_path / "a.jsonl", rows)), "tokens": 200, "holdout": "0"}
    caches = [cache.run(cache_settings(model=str(model), **given), output=tmp_path / "with", **HERE).cache]
    for file in model.glob("*token*"):
        file.unlink()
    caches.append(cache.run(cache_settings(model=str(model), **given), output=tmp_path / "without", **HERE).cache)
    keys = ["layer0/in", "layer0/out", "token_id"]
    units = [made.split("train").read_unit(0, keys) for made in caches]
    for key in keys:
        np.testing.assert_array_equal(units[0][key], units[1][key])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "the law"}] * 40)
    chosen = cache_settings(model=str(model), **{**given, "dataset": str(tmp_path / "b.jsonl")})
    with pytest.raises(ModelError, match=r"has no tokenizer .tokenizer.json., so it reads token ids only"):
        cache.run(chosen, output=tmp_path / "text", **HERE)


# Conversations

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{{ eos_token }}"
)
CHATS = [
    [{"role": "user", "content": "the law?"}, {"role": "assistant", "content": f"of the land, {number}"}]
    for number in range(40)
]
SHAREGPT = [
    [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in chat]
    for chat in CHATS
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(TINY_LM, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def read_texts(made, split="train"):
    """Return what the contexts of a cache spell, without the BOS of each."""
    vocabulary, train = made.vocabulary(), made.split(split)
    tokens = train.context_tokens(np.arange(train.n_contexts))[:, 1:].ravel()
    return "".join(vocabulary[token] for token in tokens)


@pytest.mark.parametrize("suffix", quick([".jsonl", ".parquet"], ".jsonl"))
@pytest.mark.parametrize(("column", "chats"), [("messages", CHATS), ("conversations", SHAREGPT)])
def test_conversations_are_written_by_the_chat_template(tmp_path, chat_model, column, chats, suffix):
    path = tmp_path / f"a{suffix}"
    rows = [{"id": number, column: chat} for number, chat in enumerate(chats)]
    write_jsonl(path, rows) if suffix == ".jsonl" else Dataset.from_list(rows).to_parquet(path)
    chosen = cache_settings(
        model=str(chat_model), dataset=str(path), tokens="all", holdout="0", shuffle_window=0, layers="0"
    )
    made = cache.run(chosen, output=tmp_path / "made", **HERE).cache
    end = made.vocabulary()[0]
    said = "".join(f"[user] the law?\n[assistant] of the land, {number}\n{end}" for number in range(40))
    read = read_texts(made).replace(end, "")
    assert len(read) > 1000
    assert said.replace(end, "").startswith(read)
    assert made.manifest.text["column"] == column
    assert made.manifest.packing["chat_template"].startswith("sha256:")


def test_names_of_special_tokens_in_a_message_are_letters(chat_model):
    tokenizer = ModelTokenizer(AutoTokenizer.from_pretrained(chat_model), name="chat", d_vocab=4096)
    chat = [{"role": "user", "content": "a <|endoftext|> b"}]
    assert tokenizer.tokenize_chat(chat, is_markup=False).ids.count(0) == 2  # the template's own BOS and EOS
    assert tokenizer.tokenize_chat(chat, is_markup=True).ids.count(0) == 3


def test_date_that_a_template_writes_is_the_same_on_every_day(chat_model):
    made = AutoTokenizer.from_pretrained(chat_model)
    made.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    tokenizer = ModelTokenizer(made, name="chat", d_vocab=4096)
    vocabulary = tokenizer.vocabulary()
    ids = tokenizer.tokenize_chat(CHATS[0], is_markup=False).ids
    assert "".join(vocabulary[token] for token in ids).startswith("01 Jan 2025<|endoftext|>[user] the law?")


BAD_CHATS = {
    "[]": "holds [] in column 'messages', wanted a conversation",
    '[{"role": "user"}]': "as message 1 in column 'messages', wanted a role and a content",
    '[{"role": "user", "content": 5}]': "as message 1 in column 'messages', wanted a role and a text",
    '[{"role": "user", "content": "\\ud83d"}]': "holds half a character",
    "null": "holds nothing (null) in column 'messages', wanted a conversation",
}


@pytest.mark.parametrize("chat", BAD_CHATS)
def test_row_that_is_no_conversation_is_a_bad_row(tmp_path, chat):
    good = json.dumps({"messages": CHATS[0]})
    path = write_lines(tmp_path / "a.jsonl", [good, f'{{"messages": {chat}}}', good])
    with pytest.raises(TextError, match=re.escape(BAD_CHATS[chat])):
        list(open_text(path))
    assert [document.messages for document in open_text(path, on_bad_row="skip")] == [CHATS[0], None, CHATS[0]]


@pytest.mark.slow
def test_conversation_that_the_template_refuses_is_named_and_a_model_without_a_template_is_refused(
    tmp_path, chat_model
):
    rows = [{"messages": chat} for chat in CHATS]
    rows[7] = {"messages": [{"role": "tool", "content": "x"}]}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    chosen = cache_settings(
        model=str(chat_model), dataset=str(path), tokens=300, holdout="0", shuffle_window=0, layers="0"
    )
    with pytest.raises(TextError, match=r"document 7 is no conversation for this model's chat template: no role tool"):
        cache.run(chosen, output=tmp_path / "made", **HERE)
    made = cache.run(chosen.model_copy(update={"on_bad_row": "skip"}), output=tmp_path / "made", **HERE).cache
    assert made.manifest.packing["bad_rows"] == [
        "document 7: is no conversation for this model's chat template: no role tool"
    ]
    without = chosen.model_copy(update={"model": str(TINY_LM)})
    with pytest.raises(ModelError, match=r"has no chat template to write conversations by"):
        cache.run(without, output=tmp_path / "without", **HERE)


# Rows by role


def written(chat_model, *messages, roles="assistant", template=TEMPLATE):
    """Return the text of what is left out of a conversation and of what is kept, in turn."""
    made = AutoTokenizer.from_pretrained(chat_model)
    made.chat_template = template
    tokenizer = ModelTokenizer(made, name="chat", d_vocab=4096)
    chat = [{"role": role, "content": said} for role, said in messages]
    plain = tokenizer.tokenize_chat(chat, is_markup=False)
    ids, left_out = tokenizer.tokenize_chat(chat, is_markup=False, roles=roles.split(","))
    assert (ids, None) == plain
    vocabulary = tokenizer.vocabulary()
    pairs = groupby(zip(ids, left_out or [], strict=True), key=lambda pair: pair[1])
    return [(is_left_out, "".join(vocabulary[token] for token, _ in tokens)) for is_left_out, tokens in pairs]


END = "<|endoftext|>"


def test_tokens_are_kept_by_the_role_of_their_message(chat_model):
    said = [("user", "user"), ("assistant", "  assistant 5 \n"), ("system", "x"), ("assistant", "")]
    # The space before the answer is the template's, but one token with the answer's first letters.
    assert written(chat_model, *said, template=TEMPLATE.replace("content }}", "content | trim }}")) == [
        (True, f"{END}[user] user\n[assistant]"),
        (False, " assistant 5"),
        (True, f"\n[system] x\n[assistant] \n{END}"),
    ]
    assert written(chat_model, *said[:3], roles="system,user") == [
        (True, f"{END}[user]"),
        (False, " user"),
        (True, "\n[assistant]   assistant 5 \n\n[system] "),
        (False, "x"),
        (True, f"\n{END}"),
    ]
    # Names of special tokens are letters wherever they are said.
    spelled = [("user", f"a {END} b"), ("assistant", f"{END} c"), ("user", END)]
    assert written(chat_model, *spelled) == [
        (True, f"{END}[user] a {END} b\n[assistant] "),
        (False, f"{END} c"),
        (True, f"\n[user] {END}\n{END}"),
    ]


@pytest.mark.parametrize(
    "content", ["content.split('of')[-1]", "content | upper | replace('\ufdd0', '')", "content | length"]
)
def test_conversation_whose_messages_a_template_cuts_is_refused_if_rows_are_by_role(chat_model, content):
    with pytest.raises(TextError, match="cuts or changes what messages say"):
        written(
            chat_model,
            ("assistant", "one of two"),
            template="{% for m in messages %}{{ m." + content + " }}{% endfor %}",
        )


def cache_of_roles(folder, chat_model, name, roles, **changes):
    path = write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    settings = {"tokens": "all", "holdout": "0", "shuffle_window": 0, "layers": "0", **changes}
    chosen = cache_settings(model=str(chat_model), dataset=str(path), roles=roles, **settings)
    with small_blocks():
        return cache.run(chosen, output=folder / name, **HERE).cache


def rows_of(made, key, split="train"):
    """Return the rows of a cache in token order."""
    opened = made.split(split)
    return np.concatenate([opened.read_unit(unit, [key])[key] for unit in range(opened.n_units)])


def contexts_of(made, split="train"):
    opened = made.split(split)
    every = np.arange(opened.n_contexts)
    return opened.context_tokens(every), opened.context_documents(every)


@pytest.fixture(scope="module")
def role_caches(tmp_path_factory, chat_model):
    """Caches of the same conversations: all rows, what the assistant says, and what user and assistant say."""
    folder = tmp_path_factory.mktemp("roles")
    chosen = {"all": None, "assistant": "assistant", "both": " user, assistant"}
    return {name: cache_of_roles(folder, chat_model, name, roles) for name, roles in chosen.items()}


def test_rows_are_what_the_chosen_roles_say_and_contexts_are_whole(role_caches):
    answers = [f" of the land, {number}" for number in range(40)]
    said = {"assistant": answers, "both": [f" the law?{answer}" for answer in answers]}
    vocabulary, every = role_caches["all"].vocabulary(), contexts_of(role_caches["all"])
    for name, expected in said.items():
        made = role_caches[name]
        read = "".join(vocabulary[token] for token in rows_of(made, "token_id"))
        assert len("".join(expected)) - len(read) in range(16 * 5), "no more than a context is left over"
        assert "".join(expected).startswith(read)
        for found, whole in zip(contexts_of(made), every, strict=True):
            np.testing.assert_array_equal(found, whole)
    answer = role_caches["assistant"]
    tokens, documents = contexts_of(answer)
    context, position, document = (rows_of(answer, key) for key in ("context", "position", "document"))
    np.testing.assert_array_equal(tokens[context, position], rows_of(answer, "token_id"))
    np.testing.assert_array_equal(documents[context, position], document)
    numbers = [vocabulary[token].strip() for token in rows_of(answer, "token_id")]
    assert {n for n, number in zip(document, numbers, strict=True) if number == "land"} == set(range(max(document) + 1))
    assert answer.manifest.packing["row_filter"]["roles"] == "assistant"
    assert role_caches["both"].manifest.packing["row_filter"]["roles"] == "assistant,user"
    assert "roles" not in role_caches["all"].manifest.packing["row_filter"]
    # Contexts begin inside messages of either role, and no row begins them.
    assert position.min() == 1
    assert 0 < np.count_nonzero(position == 1) < answer.split("train").n_contexts


def test_activations_are_those_of_a_cache_with_all_rows(role_caches):
    keys = ("context", "position", "layer0/in")
    every, answer = ([rows_of(role_caches[name], key) for key in keys] for name in ("all", "assistant"))
    at = dict(zip(zip(*(values.tolist() for values in every[:2]), strict=True), every[2], strict=True))
    expected = [at[pair] for pair in zip(*(values.tolist() for values in answer[:2]), strict=True)]
    np.testing.assert_array_equal(answer[2], np.stack(expected))


def test_cache_of_roles_is_verified_and_its_evaluation_sees_its_rows(role_caches):
    made = role_caches["assistant"]
    done = verify.run(made.path, pairs=8, **HERE)
    assert done.passed
    assert [pair.n_rows for pair in done.pairs] == [pair.n_rows for pair in done.pairs if pair.n_rows > 8]
    recorded = open_recorded_model(made)
    train = made.split("train")
    kept = recorded.batch(train, np.arange(train.n_contexts)).where.numpy()
    context, position = np.nonzero(kept)
    np.testing.assert_array_equal(context, rows_of(made, "context"))
    np.testing.assert_array_equal(position, rows_of(made, "position"))


@pytest.mark.slow
def test_cache_of_roles_grows_to_the_rows_of_one_run(tmp_path, chat_model, role_caches):
    made = cache_of_roles(tmp_path, chat_model, "made", "assistant", tokens=70)
    assert made.split("train").n_rows == 70
    shutil.copy(role_caches["assistant"].path.parent / "chats.jsonl", tmp_path)
    with small_blocks():
        grown = cache.extend(made.path, "all", **HERE).cache
    for key in ("token_id", "context", "position", "document", "layer0/out"):
        np.testing.assert_array_equal(rows_of(grown, key), rows_of(role_caches["assistant"], key))
    assert verify.run(made.path, pairs=4, **HERE).passed


@pytest.mark.slow
def test_interrupted_cache_of_roles_ends_with_the_same_bytes(tmp_path, chat_model, monkeypatch):
    chosen = {"tokens": 150, "holdout": "3::10"}
    expected = cache_of_roles(tmp_path, chat_model, "expected", "assistant", **chosen)
    commit, n_left = UnitBuffer.commit, [2]

    def interrupted(self, root, generation):
        n_left[0] -= 1
        if not n_left[0]:
            raise KeyboardInterrupt
        return commit(self, root, generation)

    with monkeypatch.context() as patch:
        patch.setattr(UnitBuffer, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_of_roles(tmp_path, chat_model, "made", "assistant", **chosen)
    made = cache_of_roles(tmp_path, chat_model, "made", "assistant", **chosen)
    assert tree(made.path) == tree(expected.path)
    vocabulary = made.vocabulary()
    held = "".join(vocabulary[token] for token in rows_of(made, "token_id", "heldout"))
    assert "".join(f" of the land, {number}" for number in (3, 13, 23, 33)).startswith(held)
    assert held


def test_live_rows_and_fresh_rows_are_by_role(tmp_path, chat_model, role_caches):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    given = {"dataset": str(path), "context_length": 16, "contexts_per_batch": 4, "shuffle_window": 0}
    given["roles"] = "assistant"
    settings = LiveSettings(
        model=str(chat_model), layers="0", holdout="3::10", buffer_rows=64, storage_dtype="float32", **given
    )
    held = cache_of_roles(tmp_path, chat_model, "held", "assistant", holdout="3::10", tokens=100)
    with LiveBatches(settings, batch_rows=8) as live:
        assert live.facts["packing"]["roles"] == "assistant"
        assert live.n_heldout_rows == held.split("heldout").n_rows
        served = torch.cat([live.next_batch()["layer0"][0].clone() for _ in range(4)]).numpy()
        model = live._model
        known = {row.tobytes() for row in rows_of(held, "layer0/in")}
        assert {row.tobytes() for row in served} <= known
        rows, _ = fresh_rows(FreshText(**given), model, live.sites["layer0"], 10_000)
    answer = role_caches["assistant"]
    fresh = rows.split
    assert fresh.n_rows == answer.split("train").n_rows
    np.testing.assert_array_equal(fresh.read_unit(0, ["position"])["position"], rows_of(answer, "position"))
    every = np.arange(answer.split("train").n_contexts)
    np.testing.assert_array_equal(fresh.context_documents(every), contexts_of(answer)[1])


def test_roles_are_refused_where_there_are_none(tmp_path, chat_model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the law"}] * 40)
    chosen = cache_settings(model=str(chat_model), dataset=str(path), roles="assistant", layers="0")
    with pytest.raises(TextError, match=r"--roles is for conversations, and column 'text' holds text"):
        cache.run(chosen, output=tmp_path / "made", **HERE)
    with pytest.raises(TextError, match=r"gives no training row at all: no message is by --roles gpt"):
        cache_of_roles(tmp_path, chat_model, "gpt", "gpt")
    with pytest.raises(SettingsError, match="wanted the names of roles"):
        cache_settings(model=str(chat_model), dataset=str(path), roles="assistant,", layers="0")
