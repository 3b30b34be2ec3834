"""Generations that are named, pinned by their readers, and pruned: what is kept stays as it was to the byte."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tailrace.storage.activation_cache import ActivationCache, open_cache, reopen_cache
from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_format import manifest_name
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.draft import Lock
from tailrace.storage.errors import ArtifactBusy, ArtifactCorrupt, ArtifactMissing, StorageFull
from tailrace.storage.generations import PRUNED, CacheAt, Generations
from tailrace.storage.materialise import materialise_epoch
from tests.support.quick import quick
from tests.support.synthetic_cache import extend_in_steps, memory_directory, widen_in_steps, write_synthetic_cache

SIZES = (3, 5, 5, 9)
"""Contexts of each generation: extended, widened, extended; 15 rows each, in shards of 32."""


@pytest.fixture(scope="module")
def written() -> Iterator[Path]:
    """A folder with the cache as it is at each generation."""
    with memory_directory() as name:
        write_synthetic_cache(Path(name) / "0", n_contexts=SIZES[0], n_heldout_contexts=1, shard_rows=32)
        for number in range(1, len(SIZES)):
            shutil.copytree(Path(name) / str(number - 1), Path(name) / str(number))
            grow(Path(name) / str(number), number)
        yield Path(name)


@pytest.fixture
def path(written: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache at generation 3, or as many as a test asks for."""
    newest = getattr(request, "param", len(SIZES) - 1)
    with memory_directory() as name:
        yield shutil.copytree(written / str(newest), Path(name) / "cache")


def at(*generations: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", generations, indirect=True)


def grow(path: Path, number: int) -> None:
    widens = SIZES[number] == SIZES[number - 1]
    added = [("layer1", 4, 4)]
    for _ in widen_in_steps(path, widths=added) if widens else extend_in_steps(path, n_contexts=SIZES[number]):
        pass


def content(cache: ActivationCache) -> dict[str, bytes]:
    found = {"digest": cache.manifest.digest.encode()}
    for name in cache.manifest.splits:
        split = cache.split(name)
        keys = [*split.layout.encodings(), "token_id", "context", "position", "document"]
        for unit in range(split.n_units):
            found |= {f"{name} {unit} {key}": rows.tobytes() for key, rows in split.read_unit(unit, keys).items()}
        found[f"{name} contexts"] = split.context_tokens(np.arange(split.n_contexts)).tobytes()
        found |= {f"{name} mean {key}": split.merged_statistics([key])[key].mean.tobytes() for key in keys[:2]}
    return found


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("oldest", quick(range(1, len(SIZES)), 2))
def test_what_is_kept_is_as_it_was_and_what_is_pruned_says_so(path: Path, oldest: int) -> None:
    before = {number: content(open_cache(path, number)) for number in range(len(SIZES))}
    freed, size = Generations(path).bytes_freed(oldest), bytes_on_disk(path)
    Generations(path).prune(oldest)
    assert {number: content(open_cache(path, number)) for number in range(oldest, len(SIZES))} == {
        number: rows for number, rows in before.items() if number >= oldest
    }
    assert verify_bytes(path) == []
    assert bytes_on_disk(path) == size - freed + (path / PRUNED).stat().st_size
    assert freed > 0
    for number in range(oldest):
        with pytest.raises(ArtifactMissing, match=rf"was pruned: generation {number}; (.|\n)*generation 3: 135"):
            open_cache(path, number)
    assert Generations(path).unneeded(oldest) == []
    assert Generations(path).train_rows == [45, 75, 75, 135]


def bytes_on_disk(path: Path) -> int:
    return sum({(at := file.stat()).st_ino: at.st_size for file in path.rglob("*") if file.is_file()}.values())


@pytest.mark.slow
@at(2)
def test_a_pruned_cache_grows_as_if_nothing_had_been_pruned(path: Path, written: Path) -> None:
    Generations(path).prune(2)
    grow(path, 3)
    wanted = written / "3"
    assert content(open_cache(path)) == content(open_cache(wanted))
    assert content(open_cache(path, 2)) == content(open_cache(wanted, 2))
    assert verify_bytes(path) == []
    Generations(path).prune(3)
    assert content(open_cache(path)) == content(open_cache(wanted))
    assert verify_bytes(path) == []


@pytest.mark.parametrize("n_deletions", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_prune_cut_off_at_any_deletion_is_finished_by_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch, n_deletions: int
) -> None:
    whole = shutil.copytree(path, path.with_name("whole"))
    Generations(whole).prune(2)
    wanted, kept = files(whole), content(open_cache(path, 2))
    unlink, rmdir = Path.unlink, os.rmdir
    left = 0

    class Killed(BaseException):
        pass

    def counted(delete):
        def deletes(*given, **options):
            nonlocal left
            delete(*given, **options)
            left -= 1
            if left == 0:
                raise Killed

        return deletes

    monkeypatch.setattr(Path, "unlink", counted(unlink))
    monkeypatch.setattr(os, "rmdir", counted(rmdir))
    n_cuts = 0
    while True:
        left = n_deletions
        try:
            Generations(path).prune(2)
            break
        except Killed:
            n_cuts += 1
        assert verify_bytes(path) == []
        assert content(open_cache(path, 2)) == kept
        with pytest.raises(ArtifactMissing, match="was pruned"):
            open_cache(path, 1)
    assert n_cuts > 100 // n_deletions
    assert files(path) == wanted
    assert {found for found in path.rglob("*") if found.is_dir() and not any(found.iterdir())} == set()


def test_a_generation_that_is_read_is_not_pruned(path: Path) -> None:
    reader = open_cache(path, 1)
    rows = reader.split("train")  # what is read from keeps it, too
    del reader
    before = files(path)
    with pytest.raises(ArtifactBusy, match=r"generation 1 is being read; wait until that is done, or .* --keep 3"):
        Generations(path).prune(2)
    assert files(path) == before
    Generations(path).prune(1)
    assert rows.read_unit(1, ["layer0/in"])
    del rows
    Generations(path).prune(3)


def test_a_reader_that_only_an_error_still_knows_is_no_reader(path: Path) -> None:
    def fail() -> None:
        reader = open_cache(path, 0)
        error = RuntimeError(f"{reader.generation}")  # knows this frame once it is raised, which knows it
        raise error

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError):
            fail()
        Generations(path).prune(3)
    finally:
        gc.enable()


READER = """
import fcntl, sys, time
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_that_dies_reads_no_longer(path: Path) -> None:
    program = [sys.executable, "-c", READER, str(path / manifest_name(0))]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "locked\n"
        with pytest.raises(ArtifactBusy):
            Generations(path).prune(3)
        reader.kill()
    Generations(path).prune(3)


def test_a_reader_without_a_lock_gets_an_error_and_no_rows_of_a_later_generation(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # as on a file system whose locks stay on one machine
        patch.setattr(fcntl, "flock", refuse_locks)
        reader = open_cache(path, 0).split("train")
    short = reader.n_units - 1
    Generations(path).prune(2)
    with pytest.raises((ArtifactMissing, ArtifactCorrupt)):
        reader.read_unit(short, ["token_id"])


def refuse_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@at(1)
def test_nothing_is_pruned_where_readers_cannot_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(path)
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    assert open_cache(path, 0).generation == 0
    with pytest.raises(StorageFull, match="has no locks"):
        Generations(path).prune(1)
    assert {name: data for name, data in files(path).items() if name != ".lock"} == before


@at(1)
def test_a_cache_that_is_written_to_is_not_pruned(path: Path) -> None:
    lock = Lock(path)
    with pytest.raises(ArtifactBusy, match="another process is writing here"):
        Generations(path).prune(1)
    lock.release()


@pytest.mark.slow
@at(0)
def test_a_growth_between_opening_and_pinning_is_read_at_its_generation(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def held_up(file: int, how: int) -> None:
        if how == fcntl.LOCK_SH and not (path / PRUNED).exists():
            monkeypatch.setattr(fcntl, "flock", flock)
            grow(path, 1)
            Generations(path).prune(1)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", held_up)
    assert open_cache(path).generation == 1


@pytest.mark.slow
def test_epochs_of_pruned_generations_go_and_others_stay(path: Path) -> None:
    for number in (1, 3):
        split = open_cache(path, number).split("train")
        materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)
    del split
    Generations(path).prune(2)
    assert [epoch.name for epoch in (path / "epochs").iterdir()] == ["train-generation3-seed0-epoch0"]
    assert verify_bytes(path) == []


@at(2)
def test_an_unknown_generation_lists_those_there_are(path: Path) -> None:
    with pytest.raises(ArtifactMissing) as caught:
        open_cache(CacheAt(path, 7))
    first, *lines = str(caught.value).split("\n  ")
    assert first == f"{path}: has no generation 7; read one of those that are kept:"
    assert [line.split(", since")[0] for line in lines] == [
        "generation 0: 45 train rows, 15 heldout rows of layer0",
        "generation 1: 75 train rows, 15 heldout rows of layer0",
        "generation 2: 75 train rows, 15 heldout rows of layer0, layer1",
    ]
    assert [line.endswith(", the newest") for line in lines] == [False, False, True]


@at(2)
def test_a_generation_that_is_named_is_opened_whatever_was_begun(path: Path) -> None:
    output = path.with_name("run")
    output.mkdir()
    begun = canonical_json({"inputs": {"cache": open_cache(path, 0).reference}})
    (output / "request.json").write_bytes(begun)
    assert reopen_cache(path, output).generation == 0
    assert reopen_cache(CacheAt(path, 1), output).generation == 1
    Generations(path).prune(1)
    with pytest.raises(ArtifactMissing, match="was pruned: generation 0"):
        reopen_cache(path, output)


@at(1)
def test_another_process_takes_a_pin_of_its_own(path: Path) -> None:
    copy = pickle.loads(pickle.dumps(open_cache(path, 0)))
    with pytest.raises(ArtifactBusy):
        Generations(path).prune(1)
    del copy
    Generations(path).prune(1)


@pytest.mark.parametrize("damage", quick([b"{}", b'{"oldest": 1, "train_rows": []}', None], None))
@at(2)
def test_a_damaged_note_is_refused(path: Path, damage: bytes | None) -> None:
    Generations(path).prune(1)
    (path / PRUNED).write_bytes((path / PRUNED).read_bytes().replace(b"1", b"2", 1) if damage is None else damage)
    with pytest.raises(ArtifactCorrupt, match=PRUNED.replace(".", r"\.")):
        open_cache(path)
    assert any(PRUNED in problem for problem in verify_bytes(path))


def test_a_disk_that_keeps_an_empty_folder_is_an_error_and_the_next_prune_deletes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(name))

    with monkeypatch.context() as disk:
        disk.setattr(os, "rmdir", refuse)
        with pytest.raises(StorageFull, match="Input/output error"):
            Generations(path).prune(2)
    Generations(path).prune(2)
    assert not (path / "statistics" / "0").exists()


def test_what_a_killed_prune_was_writing_goes_with_the_next(path: Path) -> None:
    left = path / f".{PRUNED}.tmp-host-1-1"
    left.write_bytes(b"{")
    Generations(path).prune(2)
    assert not left.exists()
