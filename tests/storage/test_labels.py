"""Labels beside tables: kept whatever the script, refused where they are not of these features, and never lost."""

from __future__ import annotations

import contextlib
import shutil
import threading
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.storage.artifact import MANIFEST, verify_artifact
from tailrace.storage.draft import Lock
from tailrace.storage.errors import (
    ActionableError,
    ArtifactBusy,
    ArtifactCorrupt,
    ArtifactMismatch,
    LabelConflict,
    SettingsError,
)
from tailrace.storage.labels import (
    FILE,
    MOST_CHARACTERS,
    SCHEMA,
    Label,
    LabelEdit,
    edit_labels,
    labels_digest,
    read_labels,
)
from tailrace.storage.tables import describe, read_schema, read_table
from tests.support.tables_by_hand import feature_row, publish_tables


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    return publish_tables(tmp_path / "tables", [feature_row(feature) for feature in range(20)], [])


def said(tables: Path) -> dict[int, tuple[str, str, bool, str]]:
    return {one.feature: (one.label, one.note, one.starred, one.author) for one in read_labels(tables).values()}


def test_what_is_not_given_stays_and_what_is_taken_away_leaves_no_row(tables: Path) -> None:
    assert read_labels(tables) == {}
    edit_labels(
        tables,
        [LabelEdit(7, "ann", "votes and\n elections", "not sports", starred=True), LabelEdit(3, "ann", note="?")],
    )
    assert said(tables) == {3: ("", "?", False, "ann"), 7: ("votes and elections", "not sports", True, "ann")}
    changed = edit_labels(tables, [LabelEdit(7, "bob", starred=False), LabelEdit(3, "bob", note="")])
    assert said(tables) == {7: ("votes and elections", "not sports", False, "bob")}
    assert [(before.starred, after.starred) for before, after in changed.values()] == [(True, False), (False, False)]


@pytest.mark.parametrize("text", ["日本語の名", "שלום", "🗳️ votes", "</script><b>", "a,b;'\"", "\u202eevil", "-"])
def test_a_label_of_any_script_comes_back_as_it_was(tables: Path, text: str) -> None:
    edit_labels(tables, [LabelEdit(0, "ann", text, f"{text}\n\n{text}")])
    assert said(tables) == {0: (text, f"{text}\n\n{text}", False, "ann")}


def test_no_byte_or_digest_of_the_tables_depends_on_labels(tables: Path) -> None:
    manifest = (tables / MANIFEST).read_bytes()
    edit_labels(tables, [LabelEdit(1, "ann", "x")])
    assert (tables / MANIFEST).read_bytes() == manifest
    assert verify_artifact(tables, "tables") == []


def test_the_file_explains_its_columns_and_says_whose_labels_it_has(tables: Path) -> None:
    edit_labels(tables, [LabelEdit(1, "ann", "x")])
    schema = read_schema(tables / FILE)
    assert all(one.meaning for one in describe(schema))
    assert schema.metadata == {b"transcoder": str(tables).encode(), b"site": b"layer0"}


@pytest.mark.parametrize("layer", [0, 1])
def test_labels_of_another_transcoder_or_layer_are_refused_to_readers_and_editors(tables: Path, layer: int) -> None:
    other = publish_tables(tables.parent / "other", [feature_row(0), feature_row(1)], [], layer=layer)
    edit_labels(tables, [LabelEdit(1, "ann", "x")])
    shutil.copy(tables / FILE, other / FILE)
    before = (other / FILE).read_bytes()
    with pytest.raises(ArtifactMismatch, match="has labels of another transcoder"):
        read_labels(other)
    with pytest.raises(ArtifactMismatch, match="Put it beside the tables it belongs to"):
        edit_labels(other, [LabelEdit(1, "ann", "y")])
    assert (other / FILE).read_bytes() == before


def test_everything_wrong_is_said_at_once_and_nothing_is_written(tables: Path) -> None:
    edits = [
        LabelEdit(20, "ann", "x"),
        LabelEdit(-1, "ann", "x"),
        LabelEdit(0, "ann", "x" * 201, "y" * 10_001),
        LabelEdit(1, "a", "\ud800"),
    ]
    with pytest.raises(SettingsError) as caught:
        edit_labels(tables, [*edits, LabelEdit(2, "ann", "good")])
    assert str(caught.value).splitlines()[1:] == [
        "feature 20: there are features 0 to 19",
        "feature -1: there are features 0 to 19",
        "feature 0, label: has 201 characters, at most 200 are kept; shorten it",
        "feature 0, note: has 10,001 characters, at most 10,000 are kept; shorten it",
        "feature 1, label: is not valid Unicode (surrogates not allowed); write it again",
    ]
    assert not (tables / FILE).exists()
    edit_labels(tables, [LabelEdit(0, "ann", "x" * MOST_CHARACTERS["label"], "名" * MOST_CHARACTERS["note"])])
    assert len(read_labels(tables)[0].note) == 10_000


def test_the_second_of_two_who_saw_the_same_label_is_told_what_it_is_now(tables: Path) -> None:
    (seen,) = [after.updated for _, after in edit_labels(tables, [LabelEdit(5, "ann", "war")]).values()]
    edit_labels(tables, [LabelEdit(5, "bob", "peace")], seen={5: seen})
    with pytest.raises(LabelConflict, match="feature 5 was edited since you looked at it: bob made it 'peace'"):
        edit_labels(tables, [LabelEdit(5, "eve", "armies"), LabelEdit(6, "eve", "ships")], seen={5: seen, 6: None})
    edit_labels(tables, [LabelEdit(5, "bob", "")])
    with pytest.raises(LabelConflict, match="its label was taken away"):
        edit_labels(tables, [LabelEdit(5, "eve", "armies")], seen={5: seen})
    assert said(tables) == {}


def test_a_feature_labelled_anew_is_not_the_version_that_was_seen_before(tables: Path) -> None:
    versions: list[datetime] = []
    for label in ("a", "", "a", "b"):
        for _, after in edit_labels(tables, [LabelEdit(5, "ann", label)]).values():
            assert after.updated is not None
            versions.append(after.updated)
    assert versions == sorted(set(versions))


def test_an_edit_that_changes_nothing_is_no_edit(tables: Path) -> None:
    edit_labels(tables, [LabelEdit(5, "ann", "war")])
    before = read_labels(tables)
    edit_labels(tables, [LabelEdit(5, "bob", "war", starred=False)])
    assert read_labels(tables) == before


def test_no_edit_of_many_at_once_is_lost(tables: Path) -> None:
    def edit(worker: int) -> None:
        for feature in range(worker, 8, 4):
            edit_labels(tables, [LabelEdit(feature, f"worker {worker}", f"label {feature}")])

    threads = [threading.Thread(target=edit, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said(tables) == {n: (f"label {n}", "", False, f"worker {n % 4}") for n in range(8)}
    assert [path.name for path in tables.iterdir() if path.name.startswith(".label")] == []


def test_an_edit_waits_for_the_lock_and_says_so_if_it_is_not_given_back(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailrace.storage.labels.WAIT_SECONDS", 0.02)
    lock = Lock(tables)
    with pytest.raises(ArtifactBusy, match="another process is writing here"):
        edit_labels(tables, [LabelEdit(5, "ann", "war")])
    lock.release()
    edit_labels(tables, [LabelEdit(5, "ann", "war")])


def test_the_digest_of_labels_is_of_what_they_say_alone() -> None:
    one, same, other = Label(1, "a", author="ann"), Label(1, "a", author="bob"), Label(1, "a", starred=True)
    assert labels_digest({1: one}) == labels_digest({1: same}) != labels_digest({1: other})


def test_damaged_labels_are_refused_in_a_sentence(tables: Path) -> None:
    edit_labels(tables, [LabelEdit(0, "me", label="äx"), LabelEdit(1, "me", note="a note")])
    whole = (tables / FILE).read_bytes()
    for place in range(len(whole) * 2 // 3, len(whole), 3):
        for bit in (1, 255):
            (tables / FILE).write_bytes(_changed(whole, place, bit))
            with contextlib.suppress(ActionableError):  # or it makes no difference
                read_labels(tables)


def _changed(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def test_texts_that_are_none_are_refused(tables: Path) -> None:
    edit_labels(tables, [LabelEdit(0, "me", label="zzzz")])
    rows = read_table(tables / FILE)
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(rows.set_column(1, SCHEMA.field("label"), broken), tables / FILE)
    with pytest.raises(ArtifactCorrupt, match=r"labels.parquet: cannot be read as Parquet \(.*UTF8.*restore it"):
        read_labels(tables)


def test_columns_of_another_type_are_refused(tables: Path) -> None:
    edit_labels(tables, [LabelEdit(0, "me", label="zzzz")])
    rows = read_table(tables / FILE)
    pq.write_table(rows.set_column(1, "label", pa.array([7])).drop_columns("note"), tables / FILE)
    with pytest.raises(ArtifactCorrupt, match=r"its columns label, note are not those of labels; restore it$"):
        read_labels(tables)
