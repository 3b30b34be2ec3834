"""``pipeline ls`` and ``rm``: what lies under a folder, what was made from what, and that only unused ones go."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

import click
import pytest

from tailrace.pipeline.artifacts import removal
from tailrace.pipeline.artifacts.folders import artifacts_inside
from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.artifacts.listing import list_artifacts, made_from
from tailrace.pipeline.shared import units
from tailrace.storage import artifact
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import seal
from tailrace.storage.draft import Lock
from tailrace.storage.errors import ActionableError, ArtifactBusy, ArtifactCorrupt, StorageFull
from tailrace.storage.labels import LabelEdit, edit_labels
from tests.support.cache_jobs import Answer, command
from tests.support.paths import ROOT

RELEASED = ROOT / "tests/released/d14043a"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache, transcoders, tables, a dashboard, a sweep and an unfinished run."""
    (tmp_path / "caches/float32").mkdir(parents=True)
    for name in ("manifest.json", "request.json"):
        shutil.copy(RELEASED / "caches/float32" / name, tmp_path / "caches/float32")
    for name in ("transcoders/topk", "transcoders/relu", "tables/topk", "dashboards/topk", "sweep"):
        shutil.copytree(RELEASED / name, tmp_path / name)
    shutil.copytree(RELEASED / "drafts/transcoder", tmp_path / "drafts/transcoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_listed_with_scores_progress_and_what_each_was_made_from(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {one["path"]: one for one in json.loads(command(capsys, "ls", "--json").out)["artifacts"]}
    assert {path: (one["kind"], one["finished"], one["made_from"]) for path, one in listed.items()} == {
        "caches/float32": ("activation-cache", True, []),
        "dashboards/topk": ("dashboard", True, ["tables/topk"]),
        "drafts/transcoder": ("transcoder", False, ["caches/float32"]),
        "sweep": ("sweep", True, ["caches/float32", "sweep/runs/k=2", "sweep/runs/k=4"]),
        "sweep/runs/k=2": ("transcoder", True, ["caches/float32"]),
        "sweep/runs/k=4": ("transcoder", True, ["caches/float32"]),
        "tables/topk": ("tables", True, ["caches/float32", "transcoders/topk"]),
        "transcoders/relu": ("transcoder", True, ["caches/float32"]),
        "transcoders/topk": ("transcoder", True, ["caches/float32"]),
    }
    n_bytes = sum(file.stat().st_size for file in (made / "transcoders/topk").rglob("*") if file.is_file())
    assert listed["transcoders/topk"]["bytes"] == n_bytes
    heldout = json.loads((made / "transcoders/topk/manifest.json").read_text())["metrics"]["heldout"]
    assert (listed["transcoders/topk"]["fvu"], listed["transcoders/topk"]["l0"]) == (heldout["fvu"], heldout["l0"])
    assert (listed["caches/float32"]["train_rows"], listed["caches/float32"]["heldout_rows"]) == (256, 150)
    assert (listed["drafts/transcoder"]["step"], listed["drafts/transcoder"]["steps"]) == (8, 12)
    text = command(capsys, "ls").out
    assert "unfinished: 67%, step 8 of 12, loss 0.604" in text
    assert re.search(r"FVU 0\.430, L0 4\.0, 16 features +caches/float32$", text, re.MULTILINE)
    assert text.endswith("; 1 unfinished\n")
    assert "\x1b" not in text


def test_a_released_folder_of_every_kind_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "ls", RELEASED)
    assert answer.code == 0, answer.err
    manifests = [path for path in RELEASED.rglob("manifest.json") if "epochs" not in path.parts]
    listed = {one.path for one in list_artifacts(RELEASED) if one.is_finished}
    assert listed == {path.parent for path in manifests}


def test_of_copies_the_nearest_counts(made: Path) -> None:
    shutil.copytree(made / "transcoders", made / "tables" / "copies")
    origins = made_from(list_artifacts(made))
    assert [one.path for one in origins[made / "tables/topk"]] == [made / "caches/float32", made / "tables/copies/topk"]


def test_what_others_were_made_from_is_not_removed_unless_it_is_forced(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, "rm", "transcoders/topk", "caches/float32")
    users = "drafts/transcoder, sweep, sweep/runs/k=2, sweep/runs/k=4, tables/topk, transcoders/relu"
    assert answer == Answer(
        1,
        "",
        f"error: caches/float32: 6 that stay were made from it: {users}; name these, too, or give --force\n"
        "transcoders/topk: 1 that stay were made from it: tables/topk; name these, too, or give --force\n",
    )
    assert "sweep/runs/k=2: 1 that stay were made from it: sweep;" in command(capsys, "rm", "sweep/runs/k=2").err
    assert len(list_artifacts(made)) == 9
    answer = command(capsys, "rm", "sweep", "tables/topk", "dashboards/topk", "--json")
    assert json.loads(answer.out)["removed"] == [
        "dashboards/topk",
        "sweep",
        "sweep/runs/k=2",
        "sweep/runs/k=4",
        "tables/topk",
    ]
    assert command(capsys, "rm", "caches/float32", "--force").out.startswith("removed 1 artifact, ")
    assert sorted(path.name for path in made.rglob("*.tmp*")) == []
    assert [str(one.path.relative_to(made)) for one in list_artifacts(made)] == [
        "drafts/transcoder", "transcoders/relu", "transcoders/topk",
    ]  # fmt: skip


def test_an_artifact_of_which_a_copy_stays_may_go(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "transcoders/topk", made / "copy")
    assert command(capsys, "rm", "copy").code == 0


def test_labels_that_were_taken_away_guard_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(made / "dashboards")
    edit_labels(made / "tables/topk", [LabelEdit(2, "ann", "votes")])
    assert "people labelled its features" in command(capsys, "rm", "tables/topk").err
    edit_labels(made / "tables/topk", [LabelEdit(2, "ann", "")])
    assert command(capsys, "rm", "tables/topk").code == 0


def test_only_artifacts_are_removed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "notes").mkdir()
    (made / "link").symlink_to(made / "transcoders/relu")
    answer = command(capsys, "rm", "transcoders", "notes", "gone", "link")
    assert (answer.code, answer.err.splitlines()) == (
        1,
        [
            "error: transcoders: is no artifact, but holds 2; name those to remove: transcoders/relu, transcoders/topk",
            "notes: no cache, transcoder, tables or other artifact lies here; check the path",
            "gone: no cache, transcoder, tables or other artifact lies here; check the path",
            "link: is a link, and what it leads to may be others'; remove the link with rm",
        ],
    )
    assert (made / "notes").is_dir()


def test_a_terminal_is_asked_first(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = iter(["n", "y"])
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: next(said))
    answer = command(capsys, "rm", "transcoders/relu")
    assert answer.code == 130
    assert "transcoders/relu  transcoder  11.7 kB" in answer.err
    assert (made / "transcoders/relu").is_dir()
    assert command(capsys, "rm", "transcoders/relu").code == 0
    assert not (made / "transcoders/relu").exists()


def test_a_removal_that_is_killed_leaves_nothing_of_it_to_be_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            removal.remove(removal.plan([made / "transcoders/relu"], [made]))
    assert artifacts_inside(made / "transcoders", "transcoder") == [made / "transcoders/topk"]
    assert [one.path.name for one in list_artifacts(made / "transcoders")] == ["topk"]
    assert len(list((made / "transcoders").iterdir())) == 2
    removal.remove(removal.plan([made / "transcoders/topk"], [made], is_forced=True))
    assert list((made / "transcoders").iterdir()) == []  # what was left is gone, too


def test_the_same_command_finishes_a_removal_that_was_killed(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert command(capsys, "rm", "sweep", "--force").code == 130
    assert len(list(made.glob(".sweep.tmp-*"))) == 1
    assert command(capsys, "rm", "sweep", "--force") == Answer(0, "removed what an earlier command left\n", "")
    assert list(made.glob(".sweep.tmp-*")) == []
    assert "artifact lies here; check the path" in command(capsys, "rm", "sweep", "--force").err


def test_what_a_damaged_artifact_was_made_with_stays_also_where_its_lock_is_gone(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = made / "tables/topk/manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"x")
    (made / "tables/topk/.lock").unlink(missing_ok=True)
    (listed,) = list_artifacts(made / "tables")
    assert listed.is_damaged
    assert "tables/topk" in command(capsys, "rm", "transcoders/topk").err


def test_a_folder_that_cannot_be_read_stops_neither_a_listing_nor_a_check(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.parent.name == "relu":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    weights = made / "transcoders/topk/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(Path, "stat", refuse)
    listing = command(capsys, "ls", "transcoders")
    assert listing.code == 1
    assert listing.out.splitlines()[1].startswith("topk ")
    assert "transcoders/relu/.lock: cannot be read (Permission denied)" in listing.err
    with pytest.raises(ArtifactCorrupt, match="cannot be read"):  # what `rm` does not see may use what it removes
        list_artifacts(made / "transcoders")
    answer = command(capsys, "verify", "transcoders")
    assert answer.code == 1
    assert "transcoders/relu: cannot be read (Permission denied)" in answer.err + answer.out
    assert "topk" in answer.out
    assert "weights.safetensors" in answer.err + answer.out


def test_a_folder_without_rights_is_no_mistake_in_the_command(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert command(capsys, "info", "transcoders/topk").code == 0
    monkeypatch.setattr(artifact, "read_regular", refuse)
    answer = command(capsys, "info", "transcoders/topk")
    assert answer.code == 1
    assert "manifest.json: " in answer.err


def test_a_run_that_is_being_written_stays(made: Path) -> None:
    lock = Lock(made / "drafts/transcoder")
    with pytest.raises(ArtifactBusy):
        removal.remove(removal.plan([made / "drafts/transcoder"], [made]))
    lock.release()
    removal.remove(removal.plan([made / "drafts/transcoder"], [made]))
    assert not (made / "drafts/transcoder").exists()


def test_a_run_of_a_sweep_that_is_being_written_stays(made: Path) -> None:
    run = next(path.parent for path in sorted((made / "sweep").rglob("*/manifest.json")))
    (made / "sweep/.lock").touch()
    lock = Lock(made / "sweep")
    with pytest.raises(ArtifactBusy, match="a process is writing in"):
        removal.remove(removal.plan([run], [made], is_forced=True))
    assert run.exists()
    lock.release()


def test_what_was_removed_before_a_refusal_is_gone_whole(made: Path) -> None:
    gone, busy = made / "dashboards/topk", made / "drafts/transcoder"
    lock = Lock(busy)
    with pytest.raises(ArtifactBusy):
        removal.remove(removal.plan([gone, busy], [made], is_forced=True))
    lock.release()
    assert list(gone.parent.iterdir()) == []


def test_nothing_is_removed_where_the_lock_cannot_be_looked_at(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageFull, match="Input/output error"):
        removal.remove(removal.plan([made / "transcoders/relu"], [made], is_forced=True))
    assert (made / "transcoders/relu").exists()


def test_a_cache_that_grows_stays(made: Path) -> None:
    cache = made / "caches/float32"
    (cache / ".lock").touch()
    lock = Lock(cache)
    with pytest.raises(ArtifactBusy, match="another process is writing here"):
        removal.remove(removal.plan([cache], [made], is_forced=True))
    lock.release()
    removal.remove(removal.plan([cache], [made], is_forced=True))
    assert not cache.exists()


def test_a_cache_that_is_read_stays_with_nothing_added(made: Path) -> None:
    cache = made / "caches/float32"
    shutil.copy(RELEASED / "caches/float32/manifest-0.json", cache)
    (cache / "manifest-0.json").chmod(0o444)
    reader, before = open_cache(cache), sorted(cache.iterdir())
    with pytest.raises(ArtifactBusy, match=r"caches/float32: generation 0 is being read; wait until that is done$"):
        removal.remove(removal.plan([cache], [made], is_forced=True))
    assert sorted(cache.iterdir()) == before
    del reader
    removal.remove(removal.plan([cache], [made], is_forced=True))
    assert not cache.exists()


def test_artifacts_are_removed_where_nothing_can_be_locked(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    shutil.copy(RELEASED / "caches/float32/manifest-0.json", made / "caches/float32")
    monkeypatch.setattr(fcntl, "flock", refuse)
    removal.remove(removal.plan([made / "caches/float32"], [made], is_forced=True))
    assert not (made / "caches/float32").exists()


@pytest.mark.parametrize("kind", [{}, {"kind": ["transcoder"]}])
def test_a_manifest_that_names_no_kind_is_none(made: Path, kind: dict[str, object]) -> None:
    (made / "transcoders/topk/manifest.json").write_bytes(seal({**kind, "inputs": {}}))
    kinds = {one.path.name: (one.kind, one.is_finished) for one in list_artifacts(made / "transcoders")}
    assert kinds == {"relu": ("transcoder", True), "topk": ("transcoder", False)}
    assert summarise(made / "transcoders/topk") == {**kind, "inputs": {}}


def test_damaged_folders_do_not_stop_a_listing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "transcoders/relu/manifest.json").write_text("{")
    (made / "transcoders/topk/manifest.json").write_text('{"kind": "of tomorrow", "digest": "sha256:1"}')
    kinds = {one.path.name: (one.kind, one.is_finished, one.is_damaged) for one in list_artifacts(made / "transcoders")}
    assert kinds == {"relu": ("transcoder", False, True), "topk": ("of tomorrow", True, False)}
    (line,) = [line for line in command(capsys, "ls", "transcoders").out.splitlines() if line.startswith("relu")]
    assert line.endswith("damaged: its manifest cannot be read")
    with pytest.raises(ActionableError, match="artifact lies here"):
        removal.plan([made / "nothing"], [])


@pytest.mark.parametrize(
    ("n_bytes", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (332_957_155, "333 MB"), (1.5e12, "1.5 TB")]
)
def test_bytes_are_shown_in_the_unit_that_fits(n_bytes: float, shown: str) -> None:
    assert units.size(n_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5, "now"), (90, "1 min"), (7300, "2 h"), (3 * 86400, "3 days"), (1e8, "1998-07-09")]
)
def test_ages_are_shown_in_the_unit_that_fits(seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailrace.pipeline.shared.units.time.localtime", time.gmtime)
    assert units.age(1e9 - seconds, now=1e9) == shown


def test_columns_are_aligned_by_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("name", "n"), (click.style("a", fg="yellow"), "10"), ("bcdef", "9")]
    assert [click.unstyle(line) for line in units.table(rows, right=(1,))] == ["name    n", "a      10", "bcdef   9"]
    assert units.cut(click.style("long line", bold=True), 5) == "long…"
    monkeypatch.setenv("COLUMNS", "300")
    assert units.width() == 110
