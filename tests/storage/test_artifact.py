"""An artifact is complete or absent, its makers exclude each other, and nothing that differs from its record passes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tailrace.storage import artifact
from tailrace.storage.artifact import (
    MANIFEST,
    REQUEST,
    Manifest,
    canonical_json,
    digest,
    make_directory,
    published_file,
    read_sealed,
    verify_artifact,
    write_atomically,
    write_output,
)
from tailrace.storage.draft import Draft
from tailrace.storage.errors import (
    ArtifactBusy,
    ArtifactCorrupt,
    ArtifactIncomplete,
    ArtifactMismatch,
    ArtifactMissing,
    StorageFull,
)
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.names import LOCK
from tailrace.storage.tables import write_table
from tests.support.paths import ROOT
from tests.support.synthetic_cache import write_synthetic_cache

REQUESTED = {"settings": {"rows": 10, "name": "α"}, "inputs": {"cache": "abc"}}


def publish(path: Path) -> dict[str, Any]:
    with Draft(path, "table", REQUESTED) as draft:
        write_atomically(path / "rows.bin", b"0123456789")
        (path / "log").mkdir()
        (path / "log" / "lines.txt").write_text("one\n")
        return draft.publish({"n_rows": 10}, ["rows.bin", "log/lines.txt"])


def fail_after_writing(path: Path) -> None:
    path.write_bytes(b"kept")
    raise ZeroDivisionError


def test_a_published_artifact_records_its_request_and_every_file(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "a")
    assert manifest == Manifest.read(tmp_path / "a", "table").as_json()
    assert manifest["kind"] == "table"
    assert manifest["n_rows"] == 10
    assert manifest["request"] == REQUESTED
    assert manifest["files"]["rows.bin"]["bytes"] == 10
    assert manifest["files"].keys() == {"rows.bin", "log/lines.txt"}
    assert manifest["digest"] == digest({key: value for key, value in manifest.items() if key != "digest"})
    assert verify_artifact(tmp_path / "a", "table") == []


def test_the_same_artifact_has_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    publish(tmp_path / "b")
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_a_draft_is_resumed_until_it_is_published(tmp_path: Path) -> None:
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        assert (draft.resumed, draft.published) == (False, False)
        write_atomically(tmp_path / "a" / "half", b"kept")
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        assert (draft.resumed, draft.published) == (True, False)
        assert (tmp_path / "a" / "half").read_bytes() == b"kept"
        draft.publish({}, ["half"])
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        assert (draft.resumed, draft.published) == (True, True)


def test_an_error_inside_a_draft_publishes_nothing_and_gives_the_lock_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Draft(tmp_path / "a", "table", REQUESTED):
        fail_after_writing(tmp_path / "a" / "half")
    with pytest.raises(ArtifactIncomplete, match="never finished; run the command that makes it again"):
        Manifest.read(tmp_path / "a", "table")
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        assert draft.resumed


def test_an_error_before_anything_was_written_leaves_the_place_to_other_settings(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Draft(tmp_path, "thing", {"k": 1}):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), Draft(tmp_path, "thing", {"k": 2}):
        fail_after_writing(tmp_path / "part")
    with pytest.raises(ArtifactMismatch, match="k: there it is 2, asked for 1"):
        Draft(tmp_path, "thing", {"k": 1})


@pytest.mark.parametrize("published", [True, False])
def test_another_request_is_refused_with_every_difference(tmp_path: Path, published: bool) -> None:
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        if published:
            draft.publish({}, [])
    other = {"settings": {"rows": 11, "name": "α", "seed": 3}, "inputs": {"cache": "abd"}}
    with pytest.raises(ArtifactMismatch) as caught:
        Draft(tmp_path / "a", "table", other)
    lines = str(caught.value).splitlines()
    assert ("a published table" if published else "an unfinished table") in lines[0]
    assert lines[1:] == [
        "  inputs.cache: there it is 'abc', asked for 'abd'",
        "  settings.rows: there it is 10, asked for 11",
        "  settings.seed: there it is None, asked for 3",
    ]
    with Draft(tmp_path / "a", "table", REQUESTED):
        pass  # the refused draft did not keep the lock


def test_a_directory_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(ArtifactMismatch, match=r"is not empty \(holds thesis.txt\)"):
        Draft(tmp_path, "table", REQUESTED)
    assert not (tmp_path / REQUEST).exists()


def test_a_draft_killed_while_its_request_was_written_starts_again(tmp_path: Path) -> None:
    def killed(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            Draft(tmp_path / "a", "table", REQUESTED)
    assert any(name.startswith(".request.json.tmp") for name in os.listdir(tmp_path / "a"))
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        assert not draft.resumed


HOLD = """
import sys
from pathlib import Path
from tailrace.storage.draft import Draft
with Draft(Path(sys.argv[1]), "table", {}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ArtifactBusy, match="another process is writing here"):
            Draft(tmp_path / "a", "table", {})
        holder.kill()
        holder.wait()
        with Draft(tmp_path / "a", "table", {}) as draft:
            assert draft.resumed


def test_a_file_where_the_directory_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(StorageFull, match="a: cannot be written"):
        Draft(tmp_path / "a", "table", {})


def test_nothing_there_another_kind_and_no_json_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="there is no table here"):
        Manifest.read(tmp_path / "nowhere", "table")
    publish(tmp_path / "a")
    with pytest.raises(ArtifactMismatch, match="holds a table, wanted a transcoder"):
        Manifest.read(tmp_path / "a", "transcoder")
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactCorrupt, match=r"is not valid JSON"):
        Manifest.read(tmp_path / "a", "table")
    (tmp_path / "a" / MANIFEST).write_text("[]")
    with pytest.raises(ArtifactCorrupt, match=r"is no manifest"):
        Manifest.read(tmp_path / "a", "table")


def every_file(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != LOCK)


@pytest.mark.parametrize("name", [MANIFEST, REQUEST, "rows.bin", "log/lines.txt"])
def test_every_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    publish(tmp_path / "a")
    assert {path.relative_to(tmp_path / "a").as_posix() for path in every_file(tmp_path / "a")} == {
        *(MANIFEST, REQUEST, "rows.bin", "log/lines.txt")
    }
    path = tmp_path / "a" / name
    data = path.read_bytes()
    for position in range(len(data)):
        for flipped in (data[position] ^ 1, ord("\t"), ord("\n")):
            if flipped != data[position]:
                path.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
                assert len(verify_artifact(tmp_path / "a", "table")) == 1, (position, flipped)


@pytest.mark.parametrize("name", [REQUEST, "rows.bin", "log/lines.txt"])
def test_a_missing_or_shortened_file_is_found(tmp_path: Path, name: str) -> None:
    publish(tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert len(verify_artifact(tmp_path / "a", "table")) == 1
    path.unlink()
    assert len(verify_artifact(tmp_path / "a", "table")) == 1


def test_a_sealed_manifest_cannot_be_reformatted(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ArtifactCorrupt, match=r"differs from its own digest"):
        read_sealed(path)


def test_canonical_json_does_not_depend_on_order_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": {"d": "é", "c": None}}) == canonical_json({"a": {"c": None, "d": "é"}, "b": 1})
    assert canonical_json({"a": "é"}) == '{\n  "a": "é"\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def refuse(code: int) -> Callable[..., Any]:
    def refused(*arguments: object, **options: object) -> Any:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize("call", ["fsync", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_refused_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    # injected: the disk's answer
    write_atomically(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(code))
        with pytest.raises(StorageFull, match="file: cannot be written"):
            write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_takes_only_part_of_a_write_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a disk that fills up takes what fits and reports no error; neither does a write of more than 2 GiB
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, bytes(data)[:3]))
    write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_read_only_disk_is_reported_even_if_it_refuses_to_clean_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux answers a deletion on a read-only file system with EROFS, even of a file that is not there
    monkeypatch.setattr(Path, "unlink", refuse(errno.EROFS))
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(StorageFull, match="Read-only file system"):
        write_atomically(tmp_path / "file", b"new")


FILL = """
import os, sys
import numpy as np
from pathlib import Path
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import StorageFull
from tailrace.storage.layout import ArraySpec
from tailrace.storage.shard import write_shard

disk = Path(sys.argv[1])
spec = ArraySpec("rows", "float32", 1024, 1024, 256)
write_atomically(disk / "file", b"old")
if sys.argv[2] == "injected":
    def full(*arguments):
        raise OSError(28, "No space left on device")
    os.write = os.posix_fallocate = full
for write in (
    lambda: write_atomically(disk / "file", bytes(2 << 20)),
    lambda: write_shard(disk / "0", np.zeros((1024, 1024), np.float32), 1024, spec),
):
    try:
        write()
    except StorageFull as error:
        print(error)
print(sorted(os.listdir(disk)), (disk / "file").read_bytes())
"""


def test_a_disk_that_runs_full_keeps_what_it_had(tmp_path: Path) -> None:
    # on a real file system of 1 MB, in a mount namespace that ends with the process; where the system allows none,
    # the same program with the answer of a full disk injected
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = f'mount -t tmpfs -o size=1m full "{tmp_path}" && "$@"'
    allowed = (
        shutil.which("unshare")
        and not subprocess.run(
            [*namespace, "sh", "-c", mount, "-", "true"], capture_output=True, check=False
        ).returncode
    )
    program = [sys.executable, "-c", FILL, str(tmp_path), "real" if allowed else "injected"]
    command = [*namespace, "sh", "-c", mount, "-", *program] if allowed else program
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot be written (No space left on device)" in line for line in lines[:2])
    assert lines[2] == "['file'] b'old'"


def test_other_errors_are_no_refusal_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"")


@pytest.fixture
def order_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every rename and every sync, in order, with the name of the file or directory."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        calls.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return calls


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_call_returns(
    tmp_path: Path, order_of_calls: list[tuple[str, str]]
) -> None:
    write_atomically(tmp_path / "file", b"data")
    assert [kind for kind, _ in order_of_calls] == ["sync", "rename", "sync"]
    assert order_of_calls[0][1].startswith(".file.tmp")
    assert order_of_calls[1:] == [("rename", "file"), ("sync", tmp_path.name)]


def test_files_are_on_disk_before_the_manifest_that_vouches_for_them(
    tmp_path: Path, order_of_calls: list[tuple[str, str]]
) -> None:
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        (tmp_path / "a" / "log").mkdir()
        (tmp_path / "a" / "log" / "lines.txt").write_text("one\n")  # not written atomically, as a log is
        order_of_calls.clear()
        draft.publish({}, ["log/lines.txt"])
    synced = order_of_calls[: order_of_calls.index(("rename", MANIFEST))]
    assert {("sync", "lines.txt"), ("sync", "log"), ("sync", "a")} <= set(synced)


def test_a_new_folder_is_on_disk_before_anything_in_it_counts(
    tmp_path: Path, order_of_calls: list[tuple[str, str]]
) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    assert order_of_calls == [("sync", tmp_path.name), ("sync", "a"), ("sync", "b")]
    order_of_calls.clear()
    make_directory(tmp_path / "a" / "b" / "c")
    assert order_of_calls == []


def test_shards_are_on_disk_before_the_record_that_vouches_for_them(
    tmp_path: Path, order_of_calls: list[tuple[str, str]]
) -> None:
    cache = write_synthetic_cache(tmp_path / "cache", n_contexts=3, n_heldout_contexts=0)

    def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
        for number in ids:
            task(number)

    materialise_epoch(cache.split("train"), seed=0, epoch=0, run_tasks=in_turn)
    for record in ("train-unit-000000.json", "bucket-000000.json"):
        before = order_of_calls[: order_of_calls.index(("rename", record))]
        # the folder of the last shard was synced after the shard got its name
        assert before.count(("rename", "0")) >= 6
        last_name = len(before) - before[::-1].index(("rename", "0"))
        assert {("sync", "0"), ("sync", "c")} <= set(before[last_name:])


def test_opening_a_draft_removes_the_half_written_files_of_a_run_that_was_killed(tmp_path: Path) -> None:
    with Draft(tmp_path / "a", "table", REQUESTED):
        for name in (".request.json.tmp-host-1-1", ".manifest.json.tmp-host-1-2"):
            (tmp_path / "a" / name).write_text("{")
    with Draft(tmp_path / "a", "table", REQUESTED):
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "request.json"]


def sweep_of(path: Path, runs: Iterable[str]) -> None:
    """Publish a sweep at ``path`` with an artifact inside for each of ``runs``."""
    with Draft(path, "sweep", {}) as sweep:
        digests = {name: publish(path / "runs" / name)["digest"] for name in runs}
        listed = [{"name": name, "path": f"runs/{name}", "digest": digest} for name, digest in digests.items()]
        (path / "runs" / "lost").mkdir()
        sweep.publish({"runs": [*listed, {"name": "lost", "path": "runs/lost", "digest": None}]}, [])


def test_the_artifacts_inside_an_artifact_are_verified_too(tmp_path: Path) -> None:
    sweep_of(tmp_path / "sweep", "ab")
    assert verify_artifact(tmp_path / "sweep", "sweep") == []
    (tmp_path / "sweep/runs/a/rows.bin").write_bytes(b"0123456780")
    shutil.rmtree(tmp_path / "sweep/runs/b")
    damaged, missing = verify_artifact(tmp_path / "sweep", "sweep")
    assert "runs/a/rows.bin: checksum is" in damaged
    assert "runs/b/manifest.json: is missing" in missing


def test_another_artifact_in_the_stead_of_one_inside_is_found(tmp_path: Path) -> None:
    sweep_of(tmp_path / "sweep", "a")
    shutil.rmtree(tmp_path / "sweep/runs/a")
    with Draft(tmp_path / "sweep/runs/a", "table", {"rows": 7}, inside=True) as other:
        other.publish({}, [])
    (problem,) = verify_artifact(tmp_path / "sweep", "sweep")
    assert problem == f"{tmp_path}/sweep/runs/a: is not the table that {tmp_path}/sweep was published with"


def test_a_file_that_cannot_be_read_hides_no_other_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "a")
    (tmp_path / "a/rows.bin").write_bytes(b"0123456780")
    opened = Path.open

    def bad_sector(path: Path, *arguments: Any, **keywords: Any) -> Any:  # injected: the disk's answer
        if path.name == "lines.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", bad_sector)
    unread, damaged = verify_artifact(tmp_path / "a", "table")
    assert "log/lines.txt: cannot be read (Input/output error); check its permissions and the disk" in unread
    assert "rows.bin: checksum is" in damaged


def test_a_manifest_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "a")

    def refused(path: Path) -> bytes:  # injected: the disk's answer
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(artifact, "read_regular", refused)
    with pytest.raises(ArtifactCorrupt, match=r"manifest.json: cannot be read \(Permission denied\); check"):
        Manifest.read(tmp_path / "a", "table")


def test_what_killed_commands_left_of_an_output_is_deleted_when_it_is_written_again(tmp_path: Path) -> None:
    machine, dead = os.uname().nodename, 2**22 + 1  # beyond the largest process id
    kept = [f".x.html.tmp-{machine}-{os.getpid()}-1", f".x.html.tmp-other-{dead}-1", f".y.tmp-{machine}-{dead}-1"]
    for name in (f".x.html.tmp-{machine}-{dead}-1", *kept):
        (tmp_path / name).touch()
    write_output(tmp_path / "x.html", b"page")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x.html"])
    (tmp_path / f".t.parquet.tmp-{machine}-{dead}-1").touch()
    write_table(tmp_path / "t.parquet", pa.schema([("v", pa.int32())]), [])
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "t.parquet", "x.html"])


def test_a_file_is_compared_with_its_record_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path)
    manifest = Manifest.read(tmp_path, "table")
    assert published_file(tmp_path, manifest, "rows.bin") == tmp_path / "rows.bin"
    with pytest.raises(ArtifactCorrupt, match=r"lines: is no file of the artifact; it has log/lines.txt, rows.bin"):
        published_file(tmp_path, manifest, "lines")
    (tmp_path / "rows.bin").write_bytes(b"0123456780")
    with pytest.raises(ArtifactCorrupt, match=r"rows.bin: checksum is"):
        published_file(tmp_path, manifest, "rows.bin")
    monkeypatch.setattr(artifact, "SMALL", 9)
    published_file(tmp_path, manifest, "rows.bin")  # a large file's size alone is compared
    with pytest.raises(ArtifactCorrupt, match=r"rows.bin: checksum is"):
        published_file(tmp_path, manifest, "rows.bin", whole=True)
    (tmp_path / "rows.bin").write_bytes(b"0123456789+")
    with pytest.raises(ArtifactCorrupt, match=r"rows.bin: has 11 bytes, its record says 10; restore the file"):
        published_file(tmp_path, manifest, "rows.bin")


def test_nothing_is_begun_in_a_finished_artifact_but_what_is_part_of_it(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    for path in (tmp_path / "a/b", tmp_path / "a/b/c"):
        with pytest.raises(ArtifactMismatch, match=r"a/b.*: lies in the finished artifact .*/a and would be deleted"):
            Draft(path, "table", REQUESTED)
        assert not (tmp_path / "a/b").exists()
    with Draft(tmp_path / "a/b", "table", REQUESTED, part_of=tmp_path / "a") as draft:
        assert not draft.published


def test_what_is_being_written_is_no_abandoned_work(tmp_path: Path) -> None:
    with Draft(tmp_path / "a", "table", REQUESTED) as draft:
        (draft.path / "rows.bin").write_bytes(b"0")
        with pytest.raises(ArtifactIncomplete, match="another process is writing this table; wait until that is done"):
            Manifest.read(tmp_path / "a", "table")
    with pytest.raises(ArtifactIncomplete, match="this table was never finished"):
        Manifest.read(tmp_path / "a", "table")
