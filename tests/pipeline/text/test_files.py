import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.pipeline.text.files import find_text_files
from tailrace.pipeline.text.settings import TextSettings
from tailrace.storage.artifact import checksum_file
from tailrace.storage.errors import SettingsError, TextError
from tests.support.text_files_written import COMPRESSORS, open_text, texts_of, write_jsonl, write_texts, zstandard

PROSE = "one a\none b\n\ntwo\n"


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        (None, [PROSE]),
        ("document", [PROSE]),
        ("paragraph", ["one a\none b", "two\n"]),
        ("line", ["one a", "one b", "", "two"]),
    ],
)
def test_text_unit_decides_what_a_document_of_a_text_file_is(tmp_path, unit, documents):
    (tmp_path / "prose.txt").write_text(PROSE)
    assert texts_of(open_text(tmp_path / "prose.txt", text_unit=unit)) == documents


def test_folder_is_read_at_any_depth_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text("not text of the dataset")
    assert texts_of(open_text(tmp_path)) == ["a/b/c.txt", "a/z.txt", "b.txt"]


def test_pattern_names_files(tmp_path):
    for name in ("a1.jsonl", "a0.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    assert texts_of(open_text(tmp_path / "a*.jsonl")) == ["a0.jsonl", "a1.jsonl"]


def test_file_name_with_brackets_means_itself(tmp_path):
    (tmp_path / "a[1]?.txt").write_text("itself")
    (tmp_path / "a1b.txt").write_text("another")
    assert texts_of(open_text(tmp_path / "a[1]?.txt")) == ["itself"]


def test_json_may_be_lines_or_one_list(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    write_jsonl(tmp_path / "lines.json", rows)
    assert texts_of(open_text(tmp_path / "list.json")) == ["a", "b"]
    assert texts_of(open_text(tmp_path / "lines.json")) == ["a", "b"]


def test_parquet_of_token_ids_is_read_as_tokens(tmp_path):
    pq.write_table(pa.table({"input_ids": pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))}), tmp_path / "t.parquet")
    stream = open_text(tmp_path / "t.parquet")
    assert stream.kind == "tokens"
    assert [(d.index, d.tokens) for d in stream] == [(0, [1, 2]), (1, []), (2, [3])]


@pytest.mark.parametrize("suffix", sorted(COMPRESSORS))
def test_compressed_files_are_read_like_plain_ones(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("première\nligne".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "x"}\n{"text": "y"}\n'))
    assert texts_of(open_text(tmp_path / f"a.txt{suffix}")) == ["première\nligne"]
    assert texts_of(open_text(tmp_path / f"b.jsonl{suffix}")) == ["x", "y"]


def test_every_frame_of_a_zstandard_file_is_read(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard(b'{"text": "x"}\n', b'{"text": "y"}\n'))
    assert texts_of(open_text(tmp_path / "a.jsonl.zst")) == ["x", "y"]


def test_identity_names_files_by_what_they_hold_and_not_where_they_lie(tmp_path):
    identities = []
    for home in ("here", "there"):
        (tmp_path / home / "sub").mkdir(parents=True)
        (tmp_path / home / "a.txt").write_text("one")
        (tmp_path / home / "sub" / "b.txt").write_text("three")
        identities.append(open_text(tmp_path / home, seed=5).identity())
    assert identities[0] == identities[1]
    assert identities[0] == {
        "source": "local",
        "format": "text",
        "text_unit": "document",
        "files": [
            {"name": "a.txt", "bytes": 3, "checksum": checksum_file(tmp_path / "here/a.txt")},
            {"name": "sub/b.txt", "bytes": 5, "checksum": checksum_file(tmp_path / "here/sub/b.txt")},
        ],
        "column": "text",
        "kind": "text",
        "shuffle_window": 0,
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("speches.txt", "did you mean .*speeches.txt"),
        ("nowhere/speeches.txt", "there is no folder .*nowhere"),
        ("*.jsonl", "no file matches this pattern"),
        ("empty", "is an empty folder; wanted .txt, .jsonl"),
        ("pictures", r"holds no text file \(found a.png\)"),
        ("*.*", "matches .*notes.md, which is no text file"),
    ],
)
def test_path_that_leads_nowhere_is_refused_with_the_next_step(tmp_path, asked, said):
    (tmp_path / "speeches.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"")
    with pytest.raises(TextError, match=said):
        open_text(tmp_path / asked)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"speeches\xff.txt")).write_text("x")
    with pytest.raises(TextError, match=r"holds 'speeches\\udcff.txt', a name that is not UTF-8"):
        find_text_files(str(tmp_path))


def test_formats_are_not_mixed(tmp_path):
    write_texts(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(TextError, match=r"several formats \(.*a.jsonl, .*b.txt\); name one with a pattern"):
        find_text_files(str(tmp_path))


def test_text_unit_of_rows_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"text_unit=line is for \.txt files"):
        open_text(write_texts(tmp_path / "a.jsonl", 1), text_unit="line")


def test_settings_of_hub_datasets_are_refused_for_local_files(tmp_path):
    with pytest.raises(SettingsError, match="dataset_revision, split is for hub datasets"):
        TextSettings.read({"dataset": str(tmp_path), "split": "test", "dataset_revision": "main"})


def test_window_of_a_few_documents_is_refused():
    with pytest.raises(SettingsError, match=r"0 \(no shuffling\) or at least 16"):
        TextSettings.read({"dataset": "./a.txt", "shuffle_window": "8"})


@pytest.mark.parametrize(("name", "unit"), [("none.jsonl", None), ("none.txt", "line")])
def test_file_without_a_document_is_refused(tmp_path, name, unit):
    (tmp_path / name).write_text("")
    with pytest.raises(TextError, match="holds no document"):
        texts_of(open_text(tmp_path / name, text_unit=unit))


def test_empty_file_among_others_is_passed_over(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    assert texts_of(open_text(tmp_path)) == ["x"]


def test_parquet_without_rows_is_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="holds no document"):
        texts_of(open_text(tmp_path / "a.parquet"))


BROKEN = {
    "latin.txt": "café".encode("latin-1"),
    "torn.txt.gz": COMPRESSORS[".gz"](b"hello world\n" * 100)[:-20],
    "plain.txt.gz": b"not compressed",
    "broken.json": b'[{"text": "a"}, {"text": ',
    "broken.parquet": b"nothing like it",
    "broken.txt.zst": b"nothing like it",
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_file_is_named_and_not_retried(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(TextError, match=f"{name}: cannot be read .*or leave it out"):
        texts_of(open_text(tmp_path / name))


def test_damaged_file_among_others_is_named_with_the_document(tmp_path):
    write_texts(tmp_path / "a.json", 20)
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(TextError, match=r"b.json: cannot be read at document 21 of the dataset .Expecting value"):
        texts_of(open_text(tmp_path))


def test_row_without_the_column_is_refused(tmp_path):
    write_texts(tmp_path / "a.jsonl", 3)
    write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    with pytest.raises(TextError, match=r"b.jsonl, row 1 .line 1.: document 3 holds nothing"):
        texts_of(open_text(tmp_path))
