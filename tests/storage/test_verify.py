"""Every byte of a cache is covered by some record: whichever one changes, ``verify_bytes`` says which file it is in."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from tailrace.storage import parsing
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, REQUEST, seal
from tailrace.storage.cache_format import KIND, VOCABULARY
from tailrace.storage.cache_verify import total_bytes, verify_bytes
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactCorrupt, ArtifactIncomplete, ArtifactMismatch, ArtifactMissing
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.names import LOCK, remove_temporary, temporary_path
from tests.support.synthetic_cache import extend_in_steps, memory_directory, widen_in_steps, write_synthetic_cache


@pytest.fixture(scope="module")
def grown() -> Iterator[Path]:
    """A cache of three generations with every kind of file: int8, superseded shards, a materialised epoch."""
    with memory_directory() as directory:
        path = Path(directory) / "cache"
        write_synthetic_cache(
            path,
            n_contexts=8,
            n_heldout_contexts=2,
            dtype="int8",
            context_length=8,
            shard_rows=64,
            chunk_rows=32,
            sae=True,
        )
        for _ in extend_in_steps(path, n_contexts=12):
            pass
        for _ in widen_in_steps(path, widths=[("layer1", 4, 6)], dtype="bfloat16"):
            pass
        materialise_epoch(open_cache(path).split("heldout"), seed=0, epoch=0, run_tasks=in_turn)
        yield path


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


@pytest.fixture
def copied(grown: Path) -> Iterator[Path]:
    with memory_directory() as directory:
        shutil.copytree(grown, Path(directory) / "cache")
        yield Path(directory) / "cache"


def every_file(root: Path) -> list[str]:
    files = (path for path in root.rglob("*") if path.is_file() and path.name != LOCK)
    return sorted(path.relative_to(root).as_posix() for path in files)


def test_an_intact_cache_has_no_problems_and_every_shard_is_read_once(copied: Path) -> None:
    checked: list[int] = []
    assert verify_bytes(copied, checked.append) == []
    shards = [name for name in every_file(copied) if "/c/" in name and not name.startswith(("statistics", "epochs"))]
    plain = [name for name in shards if "column_scale" not in name]
    assert sum(checked) == total_bytes(open_cache(copied)) == sum((copied / name).stat().st_size for name in plain)


def test_the_example_has_every_kind_of_file(grown: Path) -> None:
    kinds = (
        "superseded/0/train/",
        "epochs/",
        "statistics/2/",
        "commits/1/",
        "manifest-2",
        "train/sites/layer0/in/q/c/",
    )
    assert all(any(name.startswith(kind) for name in every_file(grown)) for kind in kinds)


def changed(data: bytes, number: int) -> bytes:
    """Change one byte: of one file the first, of the next the middle one, of the one after the last."""
    position = (0, len(data) // 2, len(data) - 1)[number % 3]
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_one_changed_byte_in_any_file_is_found(copied: Path) -> None:
    missed = []
    numbers = {name: number for number, name in enumerate(every_file(copied))}
    # without its JSON a cache is not read further, so each such file is changed alone; rows, all at once
    rows = [name for name in numbers if not name.endswith(".json")]
    for names in (rows, *([name] for name in numbers if name.endswith(".json"))):
        intact = {name: (copied / name).read_bytes() for name in names}
        for name in names:
            (copied / name).write_bytes(changed(intact[name], numbers[name]))
        problems = verify_bytes(copied)
        missed += [name for name in names if not any(f"{name}:" in problem for problem in problems)]
        for name in names:
            (copied / name).write_bytes(intact[name])
    assert missed == []
    assert verify_bytes(copied) == []


@pytest.mark.slow
def test_any_file_that_is_cut_short_or_gone_is_found(copied: Path) -> None:
    missed = []
    for number, name in enumerate(every_file(copied)):
        if name.endswith(f"/{MANIFEST}") or name == MANIFEST or name.startswith("superseded/0/heldout"):
            continue  # unpublished without it; or an extension kept it although it did not replace it
        data = (copied / name).read_bytes()
        if number % 2:
            (copied / name).write_bytes(data[:-1])
        else:
            (copied / name).unlink()
        if not any(name in problem for problem in verify_bytes(copied)):
            missed.append(name)
        (copied / name).write_bytes(data)
    assert missed == []


def test_all_damaged_shards_are_listed(copied: Path) -> None:
    for unit in (0, 1):
        (copied / f"train/token_id/c/{unit}").unlink()
    problems = verify_bytes(copied)
    assert len(problems) == 2
    assert all("is missing" in problem for problem in problems)


@pytest.mark.parametrize("manifest", ["manifest-0.json", MANIFEST, "manifest-2.json"])
def test_a_damaged_manifest_hides_no_other_damage(copied: Path, manifest: str) -> None:
    for name in (manifest, VOCABULARY, "train/token_id/c/0"):
        data = bytearray((copied / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copied / name).write_bytes(data)
    problems = verify_bytes(copied)
    for name in (manifest, VOCABULARY, "train/token_id/c/0"):
        assert any(f"{copied / name}: " in problem for problem in problems), (name, problems)
    assert len(problems) == 3


@pytest.mark.parametrize("refused", ["manifest-2.json", "manifest-1.json", "zarr.json"])
def test_a_file_that_the_disk_refuses_hides_no_other_damage(
    copied: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    (copied / "train/token_id/c/0").unlink()
    opened = parsing.open_regular

    def bad_sector(path: Path) -> BinaryIO:  # injected: the disk's answer
        if path.name == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path)

    monkeypatch.setattr(parsing, "open_regular", bad_sector)
    problems = verify_bytes(copied)
    assert any(f"{refused}: cannot be read (Input/output error)" in problem for problem in problems)
    assert any("train/token_id/c/0: is missing" in problem for problem in problems)


def test_a_manifest_that_was_lost_is_told_from_one_that_never_was(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(ArtifactCorrupt, match=r"manifest.json: is missing, and manifest-1.json says that it was there"):
        open_cache(copied)
    assert ["is missing" in problem for problem in verify_bytes(copied)] == [True]
    with pytest.raises(ArtifactCorrupt, match="is missing, and"):
        Draft(copied, KIND, json.loads((copied / REQUEST).read_bytes()))


def test_without_a_manifest_nothing_is_published(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    for later in copied.glob("manifest-[1-9].json"):
        later.unlink()
    with pytest.raises(ArtifactIncomplete, match="never finished"):
        open_cache(copied)
    with pytest.raises(ArtifactIncomplete, match="never finished"):
        verify_bytes(copied)
    (copied / REQUEST).unlink()
    with pytest.raises(ArtifactMissing, match="no activation-cache here"):
        verify_bytes(copied)


def test_a_generation_that_grew_on_another_one_is_found(copied: Path) -> None:
    manifest = json.loads((copied / "manifest-0.json").read_bytes())
    manifest["seed"] = 5
    (copied / "manifest-0.json").write_bytes(seal({key: value for key, value in manifest.items() if key != "digest"}))
    assert any("manifest-0.json: generation 1 grew on another one" in problem for problem in verify_bytes(copied))


def test_a_missing_commit_record_is_found(copied: Path) -> None:
    (copied / "commits/1/train-unit-000001.json").unlink()
    (problem,) = verify_bytes(copied)
    assert problem.endswith("commits/1/train-unit-000001.json: is missing")


def test_a_missing_vocabulary_is_found(copied: Path) -> None:
    (copied / VOCABULARY).unlink()
    assert [problem.split("/")[-1] for problem in verify_bytes(copied)] == ["vocabulary.json: is missing"]


def test_another_format_version_is_refused_not_guessed(copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_bytes())
    manifest["format_version"] = 2
    (copied / MANIFEST).write_bytes(seal({key: value for key, value in manifest.items() if key != "digest"}))
    with pytest.raises(ArtifactMismatch, match=r"format 2 of activation-cache.*reads formats up to 1"):
        open_cache(copied)


def test_an_unfinished_materialised_epoch_is_no_problem(copied: Path) -> None:
    (epoch,) = (copied / "epochs").iterdir()
    (epoch / MANIFEST).unlink()
    (epoch / "token_id/c/0").unlink()
    assert verify_bytes(copied) == []


def test_sweeping_a_cache_leaves_the_files_of_a_running_materialisation_alone(copied: Path) -> None:
    # an epoch is written under a lock of its own while the cache may be growing
    (epoch,) = (copied / "epochs").iterdir()
    left = temporary_path(copied / "train/token_id/c/0")
    running = temporary_path(epoch / "token_id/c/0")
    for path in (left, running):
        path.write_bytes(b"half")
    remove_temporary(copied)
    assert (left.exists(), running.exists()) == (False, True)
    remove_temporary(epoch)
    assert not running.exists()
