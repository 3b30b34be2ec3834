import pyarrow as pa
import pytest

from tailrace.pipeline.text.columns import Column, choose_column
from tailrace.storage.errors import TextError
from tests.support.text_files_written import open_text, texts_of, write_jsonl


def choose(wanted=None, **columns):
    return choose_column(pa.schema(columns), wanted, "corpus")


IDS = pa.list_(pa.int64())


@pytest.mark.parametrize("name", ["text", "content", "document"])
def test_text_column_is_found_by_its_customary_name(name):
    assert choose(id=pa.int64(), **{name: pa.string()}) == Column(name, "text")


@pytest.mark.parametrize("ids", [IDS, pa.large_list(pa.int32()), pa.list_(pa.uint16(), 8)])
def test_token_ids_win_over_text(ids):
    assert choose(text=pa.string(), input_ids=ids) == Column("input_ids", "tokens", text="text")


def test_column_of_words_called_tokens_is_no_token_ids():
    assert choose(tokens=pa.list_(pa.string()), text=pa.string()) == Column("text", "text")


def test_column_may_be_named():
    assert choose("body", text=pa.string(), body=pa.string()) == Column("body", "text")
    assert choose("ids", text=pa.string(), ids=IDS) == Column("ids", "tokens")


def test_refusal_lists_columns_with_types_and_what_would_work():
    with pytest.raises(TextError) as refused:
        choose(body=pa.string(), label=pa.int64(), messages=pa.list_(pa.struct({"role": pa.string()})))
    assert str(refused.value).splitlines() == [
        "corpus: has no column named tokens, input_ids, text, content, document, raw_content, article, passage, "
        "sentence, messages, conversations, conversation that holds text, token ids or conversations. Its columns are:",
        "  body: string",
        "  label: int64",
        "  messages: list<item: struct<role: string>>",
        "To go on, pass --column body",
    ]


def test_misspelt_column_suggests_the_near_one():
    with pytest.raises(TextError, match=r"has no column 'txt'(?s:.*)pass --column text$"):
        choose("txt", text=pa.string(), body=pa.string())


def test_column_of_another_type_is_refused():
    with pytest.raises(
        TextError, match=r"column 'label' holds int64, wanted text, lists of token ids or conversations"
    ):
        choose("label", text=pa.string(), label=pa.int64())


def test_dataset_without_text_is_refused():
    with pytest.raises(TextError, match=r"choose another dataset$"):
        choose(label=pa.int64())


def test_finding_the_column_consumes_no_document(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    (tmp_path / "b.txt").write_text("a\nb\n")
    assert texts_of(open_text(tmp_path / "a.jsonl")) == ["a", "b", "c"]
    assert texts_of(open_text(tmp_path / "b.txt", text_unit="line")) == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}, {"text": None}], "document 1 holds nothing .null. in column 'text', wanted text"),
        ([{"text": "a"}, {"text": 5}], "holds 5 in column 'text'|no column named"),
        ([{"tokens": [1]}, {"tokens": [2, None]}], "document 1 holds a list with None in column 'tokens'"),
        ([{"tokens": [1]}, {"tokens": None}], "document 1 holds nothing .null. in column 'tokens', wanted a list"),
    ],
)
def test_row_that_is_no_document_is_named_by_its_index(tmp_path, rows, said):
    with pytest.raises(TextError, match=said):
        list(open_text(write_jsonl(tmp_path / "a.jsonl", rows)))
