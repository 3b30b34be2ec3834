"""Bad input to ``pipeline cache``: each refused with what is wrong and what to do, with nothing finished lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tailrace.storage.shard
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.draft import Lock
from tailrace.storage.errors import (
    ArtifactBusy,
    ArtifactCorrupt,
    ArtifactIncomplete,
    ArtifactMismatch,
    ModelError,
    SettingsError,
    StorageFull,
    TextError,
)
from tests.support.cache_jobs import (
    Job,
    Kill,
    copy_cache,
    differing,
    model_folder,
    run_cache,
    run_job,
    settings,
    small_blocks,
    text_file,
    tree,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    run_cache(path)
    return path


def refusal(error: type[Exception], output: Path, **changes: Any) -> str:
    """Return the message with which a run is refused."""
    with pytest.raises(error) as refused:
        run_cache(output, **changes)
    return str(refused.value)


# resuming with something else


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A cache killed before its third unit, and settings whose model and text the test may change."""
    moved = {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "speeches.jsonl")}
    shutil.copytree(model_folder(), moved["model"])
    shutil.copy(text_file(), moved["dataset"])
    assert run_job(Job.cache(tmp_path / "cache", **moved), Kill(1, "train-unit-000002")) != 0
    return tmp_path / "cache", moved


def test_another_model_under_the_same_name_is_refused(unfinished: tuple[Path, dict[str, str]]) -> None:
    path, moved = unfinished
    shutil.copy(model_folder(seed=5) / "model.safetensors", Path(moved["model"], "model.safetensors"))
    message = refusal(ArtifactMismatch, path, **moved)
    assert f"{path}: was made from another model or text; use the recorded one, or another --out" in message
    assert "other weights): there it is 'sha256:" in message
    assert "asked for 'sha256:" in message
    shutil.copy(model_folder() / "model.safetensors", Path(moved["model"], "model.safetensors"))
    assert run_cache(path, **moved).n_new_rows == 500 - 2 * 64 + 60  # two units were kept; 60 held-out rows


def test_another_tokenizer_is_refused(unfinished: tuple[Path, dict[str, str]]) -> None:
    path, moved = unfinished
    tokenizer = Path(moved["model"], "tokenizer.json")
    content = json.loads(tokenizer.read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[5:7]
    words[first], words[second] = words[second], words[first]
    tokenizer.write_text(json.dumps(content))
    assert "model.tokenizer.digest (content of the tokenizer): there it is 'sha256:" in refusal(
        ArtifactMismatch, path, **moved
    )


def test_a_text_that_changed_is_refused(unfinished: tuple[Path, dict[str, str]]) -> None:
    path, moved = unfinished
    Path(moved["dataset"]).write_text(text_file().read_text() + '{"text": "one more"}\n')
    message = refusal(ArtifactMismatch, path, **moved)
    assert "text.files: there it is [{'bytes':" in message


def test_a_text_that_changed_before_any_row_was_written_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "speeches.jsonl"
    shutil.copy(text_file(), text)
    job = Job.cache(tmp_path / "cache", dataset=str(text), tokens="all")
    assert run_job(job, Kill(1, "plan.json")) != 0  # contexts are packed, nothing else
    text.write_text(text_file().read_text().replace("Fellow", "Dear"))
    message = refusal(ArtifactMismatch, tmp_path / "cache", dataset=str(text), tokens="all")
    assert "text.files: there it is" in message


@pytest.mark.parametrize("state", ["unfinished", "published"])
def test_other_settings_on_the_same_path_are_refused_with_both_values(
    unfinished: tuple[Path, dict[str, str]], finished: Path, state: str
) -> None:
    path, moved = unfinished if state == "unfinished" else (finished, {})
    before = tree(path)
    message = refusal(ArtifactMismatch, path, layers="1", seed=3, **moved)
    assert f"{path}: {'an' if state == 'unfinished' else 'a'} {state} activation-cache with other settings" in message
    assert "layers: there it is '0', asked for '1'" in message
    assert "seed: there it is 0, asked for 3" in message
    assert differing(tree(path), before) == []


def test_a_finished_cache_is_returned_and_another_number_of_rows_points_to_extend(finished: Path) -> None:
    before = tree(finished)
    assert run_cache(finished).n_new_rows == 0
    for tokens in (600, "all"):
        message = refusal(ArtifactMismatch, finished, tokens=tokens)
        assert f"is a finished cache of 500 training rows, but --tokens is {tokens}; use `pipeline extend`" in message
    assert differing(tree(finished), before) == []


def test_two_writers_on_one_path_cannot_be(finished: Path, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "cache")
    try:
        assert "another process is writing here" in refusal(ArtifactBusy, tmp_path / "cache")
    finally:
        lock.release()
    assert run_cache(tmp_path / "cache").n_new_rows == 560


# a wrong request leaves the path free for the right one


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "7"}, ModelError, "layers '7': this model has 2 layers, 0 to 1"),
        (
            {"layers": None, "hooks": ["blocks.0.mpl.hook_out"]},
            ModelError,
            "no hook 'blocks.0.mpl.hook_out'; near matches: blocks.0.mlp.hook_out",
        ),
        ({"context_length": 65}, ModelError, "--context-length 65 is more than the model's 64; use at most 64"),
        ({"model": "./no/such"}, ModelError, "model no/such: no such folder"),
        ({"dataset": "./no/such.jsonl"}, TextError, "./no/such.jsonl: there is no folder"),
        ({"column": "title"}, TextError, "has no column 'title'. Its columns are:\n  text: string"),
    ],
)
def test_a_wrong_request_is_explained_and_leaves_its_path_to_a_right_one(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "cache"
    assert message in refusal(error, path, **changes)
    assert tree(path) == {}
    assert run_cache(path, tokens=64).cache.split("train").n_rows == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "holds no document"),
        (
            "numbers.jsonl",
            '{"year": 1801}\n{"year": 1802}\n',
            "text, token ids or conversations. Its columns are:\n  year: int64",
        ),
        ("short.jsonl", '{"text": "one two"}\n{"text": "three"}\n', "one context needs 15"),
        ("single.txt", "one document only\n" * 50, "pass --holdout 0, or a smaller --text-unit"),
    ],
)
def test_a_text_that_cannot_be_used_is_explained(tmp_path: Path, name: str, content: str, message: str) -> None:
    text = tmp_path / name
    text.write_text(content)
    assert message in refusal(TextError, tmp_path / "cache", dataset=str(text))
    assert tree(tmp_path / "cache") == {}


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal(ArtifactMismatch, tmp_path)
    assert "is not empty (holds notes.txt) and is no activation-cache; choose an empty directory" in message
    assert tree(tmp_path) == {"notes.txt": b"mine"}
    assert "cannot be written" in refusal(StorageFull, tmp_path / "notes.txt")


def test_a_text_that_is_too_short_says_how_to_continue_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    message = refusal(TextError, path, tokens="2M", holdout="0")
    assert (
        f"{text_file()}: ends after 1,275 training rows of the 2,000,000 wanted. Everything so far is kept" in message
    )
    assert "run the same command with --tokens 1275 (or --tokens all)" in message
    n_kept = len(list(path.glob("commits/0/train-unit-*.json")))
    assert run_cache(path, tokens=1275, holdout="0").n_new_rows == 1275 - 64 * n_kept
    run_cache(tmp_path / "direct", tokens=1275, holdout="0")
    # only one of the two has seen that the text ends there
    assert differing(tree(path), tree(tmp_path / "direct")) == ["manifest-0.json", "manifest.json", "packing/0.json"]


# disks


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk with room for some units; without the right to mount one, writing shards fails as if it were full."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and mount(place, "size=300k")
    if not mounted:
        write, written = tailrace.storage.shard._write_file, [0]

        def full(*arguments: Any) -> Any:
            written[0] += 1
            if written[0] > 20 and not (tmp_path / "freed").exists():
                raise OSError(errno.ENOSPC, "injected")
            return write(*arguments)

        monkeypatch.setattr(tailrace.storage.shard, "_write_file", full)
    yield place
    if mounted:
        subprocess.run(["umount", place], check=True)


def mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def free_space(disk: Path) -> None:
    (disk.parent / "freed").touch()
    if os.path.ismount(disk):
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)


def test_a_full_disk_is_explained_and_freeing_space_continues(disk: Path, tmp_path: Path) -> None:
    message = refusal(StorageFull, disk / "cache")
    assert "cannot be written (No space left on device). Everything finished so far is kept: free some space" in message
    n_kept = len(list(disk.glob("cache/commits/0/train-unit-*.json")))
    assert 0 < n_kept < 8
    assert not list(disk.rglob(".*.tmp*"))  # what did not fit takes no room
    free_space(disk)
    assert run_cache(disk / "cache").n_new_rows == 560 - n_kept * 64
    run_cache(tmp_path / "direct")
    assert differing(tree(disk / "cache"), tree(tmp_path / "direct")) == []


def test_a_place_that_may_not_be_written_is_explained(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and mount(place, "size=300k,ro")
    if not mounted:
        place.chmod(0o500)
    try:
        message = refusal(StorageFull, place / "cache")
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)
    reason = "Read-only file system" if mounted else "Permission denied"
    assert f"{place / 'cache'}: cannot be written ({reason})" in message


# damage


def test_a_truncated_shard_is_found_by_verifying_and_by_reading(finished: Path, tmp_path: Path) -> None:
    path = copy_cache(finished, tmp_path / "cache")
    shard = path / "train/sites/layer0/in/c/3/0"
    n_bytes = shard.stat().st_size
    os.truncate(shard, 1000)
    assert verify_bytes(path) == [f"{shard}: has 1000 bytes, its record says {n_bytes}"]
    with pytest.raises(ArtifactCorrupt, match=str(shard)):
        open_cache(path).split("train").read_unit(3, ["layer0/in"])
    with (
        pytest.raises(ArtifactCorrupt, match=str(shard)),
        open_cache(path).split("train").stream(["layer0/in"], batch_rows=50, n_epochs=1) as stream,
    ):
        list(stream)


def test_a_missing_commit_record_is_found_by_verifying_and_by_reading(finished: Path, tmp_path: Path) -> None:
    path = copy_cache(finished, tmp_path / "cache")
    record = path / "commits/0/train-unit-000003.json"
    record.unlink()
    assert f"{record}: is missing" in verify_bytes(path)
    with pytest.raises(ArtifactCorrupt, match=str(record)):
        open_cache(path).split("train").statistics("layer0", "in")


def test_an_unfinished_cache_cannot_be_opened(unfinished: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(ArtifactIncomplete, match="was never finished; run the command that makes it again"):
        open_cache(unfinished[0])


# settings


def test_every_problem_of_the_settings_is_reported_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        settings(
            tokens="6OM",
            layers=None,
            shard_rows=64,
            chunk_rows=48,
            bucket_rows="many",
            context_length=1,
            compression="zip",
            holdout="often",
            first_position=-1,
            colour="red",
        )
    assert str(refused.value).splitlines() == [
        "9 problems in settings:",
        "  tokens: '6OM' is not a quantity; write a number such as 4096, 60M, 1.5GB or 2GiB, or 'all' (got '6OM')",
        "  hooks: no layer and no hook is given: use --layers (such as 8, or all) or --hooks",
        "  first_position: Input should be greater than or equal to 0 (got -1)",
        "  context_length: wanted 2 (BOS and a token) to 65,536 (got 1)",
        "  holdout: 'often' is not understood; write a share up to 0.5 such as 0.01, 0 for no held-out "
        "documents, or document indices such as 7::20 or 3,17 (got 'often')",
        "  compression: Input should be 'none', 'lz4', 'zstd', 'gzip' or 'blosc-zstd' (got 'zip')",
        "  chunk_rows: wanted a divisor of shard_rows (64) (got 48)",
        "  bucket_rows: Input should be a valid integer, unable to parse string as an integer, or 'auto' (got 'many')",
        "  colour: is no setting",
    ]


def test_a_gpu_takes_larger_batches_unless_they_are_given_and_a_cache_keeps_what_it_was_begun_with() -> None:
    given = {"model": "m", "dataset": "d.txt", "layers": "0", "tokens": 10, "context_length": 128}
    by_default, chosen = CacheSettings.read(given), CacheSettings.read(given, {"contexts_per_batch": 8})

    def batch(settings: CacheSettings, device: str, **begun: Any) -> int:
        return settings.for_device(device, begun).contexts_per_batch

    assert (batch(by_default, "cpu"), batch(by_default, "cuda:1"), batch(chosen, "cuda")) == (32, 128, 8)
    assert batch(by_default, "cpu", contexts_per_batch=128) == batch(by_default, "cuda", contexts_per_batch=128) == 128
    assert batch(by_default, "cuda", contexts_per_batch=32) == 32
    assert batch(by_default, "cpu", contexts_per_batch=9) == 32, "another request, which is refused"
    assert CacheSettings.read(given, {"context_length": 2048}).for_device("cuda", {}).contexts_per_batch == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: wanted at least 1 (got 0)"),
        ({"contexts_per_batch": 0}, "contexts_per_batch: wanted at least 1 (got 0)"),
        ({"bucket_rows": 100}, "bucket_rows: wanted a multiple of shard_rows (64) (got 100)"),
        (
            {"shard_rows": "auto", "bucket_rows": 128},
            "bucket_rows: give shard_rows too, of which it is a multiple (got 128)",
        ),
        ({"first_position": 16}, "context_length: wanted more than first_position (16), or no row is left (got 16)"),
        ({"dataset_config": "plain"}, "dataset_config is for hub datasets"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(**changes)
    assert str(refused.value).startswith("1 problem in settings:\n")
    assert message in str(refused.value)


def test_a_run_on_a_finished_cache_loads_no_model(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache, "load_language_model")
    with small_blocks():
        assert cache.run(settings(), output=finished, compute=Compute(quiet=True)).n_new_rows == 0
