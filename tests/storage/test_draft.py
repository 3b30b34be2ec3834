"""A draft that is refused leaves its place untouched; a lock taken back leaves no trace and no second holder."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tailrace.storage.artifact import MANIFEST, REQUEST, canonical_json, write_atomically
from tailrace.storage.draft import Draft, Lock
from tailrace.storage.errors import ActionableError, ArtifactBusy, ArtifactMismatch, StorageFull
from tailrace.storage.names import LOCK, temporary_path


def names(place: Path) -> list[str]:
    return sorted(os.listdir(place))


@pytest.mark.parametrize("holds", [{LOCK: "pid 17"}, {"a.txt": ""}, {MANIFEST: "{}"}, {REQUEST: "{}"}, {REQUEST: "["}])
def test_a_refused_draft_leaves_neither_lock_nor_request(tmp_path: Path, holds: dict[str, str]) -> None:
    for name, text in holds.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ActionableError):
        Draft(tmp_path, "table", {"rows": 1})
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == holds


@pytest.mark.parametrize("text", ['{"format": "json", "url": "x"}', "[1]\n", "no JSON"])
def test_another_programs_request_is_no_draft(tmp_path: Path, text: str) -> None:
    (tmp_path / REQUEST).write_text(text)
    with pytest.raises(ArtifactMismatch, match=r"is not empty \(holds request.json\) and is no table"):
        Draft(tmp_path, "table", {"rows": 1})


def test_only_what_a_killed_draft_of_the_same_request_left_half_written_is_deleted(tmp_path: Path) -> None:
    theirs = [".notes.tmp-1", ".rows.tmp", ".rows.tmp123", ".a.tmp-host-1"]
    with Draft(tmp_path, "table", {"rows": 1}):
        of_release_01 = [tmp_path / ".rows.parquet.tmp123", tmp_path / ".rows.tmp-records"]
        for path in [*map(tmp_path.joinpath, theirs), temporary_path(tmp_path / "rows"), *of_release_01]:
            path.write_bytes(b"half")
    before = names(tmp_path)
    with pytest.raises(ArtifactMismatch):
        Draft(tmp_path, "table", {"rows": 2})
    assert names(tmp_path) == before
    with Draft(tmp_path, "table", {"rows": 1}):
        assert names(tmp_path) == sorted([*theirs, LOCK, REQUEST])


def test_what_killed_writers_left_in_subfolders_is_deleted_where_no_other_lock_is(tmp_path: Path) -> None:
    with Draft(tmp_path, "sweep", {}):
        for folder in ("snapshots", "runs/other"):
            (tmp_path / folder).mkdir(parents=True)
            temporary_path(tmp_path / folder / "weights").mkdir()
            (temporary_path(tmp_path / folder / "weights") / ".tmpXyz123").write_bytes(b"half")
        (tmp_path / "runs" / "other" / LOCK).touch()
    with Draft(tmp_path, "sweep", {}):
        assert names(tmp_path / "snapshots") == []
        assert len(names(tmp_path / "runs" / "other")) == 2


def test_only_listed_files_are_published(tmp_path: Path) -> None:
    with Draft(tmp_path, "table", {}) as draft:
        for name in ("rows", "logs/a", "notes", "deep/er/b"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("text")
        with pytest.raises(ArtifactMismatch, match=r"no part of the table: deep/er/b, notes\. Move them away"):
            draft.publish({}, ["rows"], beside=["logs"])
        assert not (tmp_path / MANIFEST).exists()
        (tmp_path / "notes").unlink()
        assert set(draft.publish({}, ["rows", "deep/er/b"], beside=["logs"])["files"]) == {"rows", "deep/er/b"}


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:  # injected: the answer of NFS without its lock daemon
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageFull, match=r"its file system has no locks \(No locks available\).+ a local disk"):
        Draft(tmp_path / "new", "table", {})
    assert names(tmp_path) == []


def test_a_draft_that_ends_before_anything_is_written_takes_the_folders_made_for_it_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "new" / "place", "table", {}):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "there", "table", {}):
        raise ZeroDivisionError
    assert names(tmp_path / "there") == []


def test_a_request_that_the_disk_refuses_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:  # injected: the disk's answer
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageFull):
        Draft(tmp_path / "new" / "place", "table", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("refused", ["a", "a/b"])
def test_a_file_in_the_way_stays_as_it_is(tmp_path: Path, refused: str) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(StorageFull, match="cannot be written"):
        Draft(tmp_path / refused, "table", {})
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_an_empty_folder_that_may_not_be_written_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:  # injected: root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageFull, match="Permission denied"):
        Draft(tmp_path, "table", {})
    assert names(tmp_path) == []


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageFull):
        Lock(tmp_path / "place")
    assert names(tmp_path) == ["place"]


def test_a_lock_taken_back_is_gone_and_one_that_was_there_stays(tmp_path: Path) -> None:
    Lock(tmp_path / "new").take_back()
    assert names(tmp_path) == []
    (tmp_path / LOCK).touch()
    Lock(tmp_path).take_back()
    assert names(tmp_path) == [LOCK]


def test_whoever_opened_a_lock_that_is_then_taken_back_locks_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else two processes hold a lock each: one on the file that is gone, one on the file that bears the name
    place, lock = tmp_path / "place", fcntl.flock
    first = [Lock(place)]

    def held_up(descriptor: int, operation: int) -> None:
        while first:
            first.pop().take_back()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", held_up)
    second = Lock(place)
    assert names(place) == [LOCK]
    with pytest.raises(ArtifactBusy):
        Lock(place)
    second.take_back()
    assert names(tmp_path) == []


def test_a_draft_begun_by_another_process_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # between looking and locking
    take = Lock._take

    def late(lock: Lock) -> bool:
        write_atomically(tmp_path / REQUEST, canonical_json({"rows": 2}))
        return take(lock)

    monkeypatch.setattr(Lock, "_take", late)
    with pytest.raises(ArtifactMismatch, match="rows: there it is 2, asked for 1"):
        Draft(tmp_path, "table", {"rows": 1})
    assert names(tmp_path) == [REQUEST]
