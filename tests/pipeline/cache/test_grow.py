"""A grown cache is the cache that would have been made at once, and what it was before stays readable."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.cache import stage
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactBusy, ArtifactMismatch, ModelError, SettingsError, TextError
from tests.support.cache_jobs import (
    HERE,
    Job,
    Kill,
    copy_cache,
    differing,
    model_folder,
    run_cache,
    run_job,
    small_blocks,
    text_file,
    tree,
)
from tests.support.quick import quick

KEYS = ("layer0/in", "layer0/out", "token_id", "context", "position", "document")


def rows(cache: ActivationCache, split: str = "train") -> dict[str, np.ndarray]:
    """Return all rows in token order."""
    units = [cache.split(split).read_unit(unit, KEYS) for unit in range(cache.split(split).n_units)]
    return {key: np.concatenate([unit[key] for unit in units]) for key in KEYS}


def served(cache: ActivationCache) -> np.ndarray:
    """Return one epoch of inputs in training order."""
    with cache.split("train").stream(["layer0/in"], batch_rows=50, n_epochs=1) as stream:
        return np.concatenate([batch.arrays["layer0/in"].copy() for batch in stream])


def shards(path: Path, below: str = "") -> dict[str, bytes]:
    """Return every shard of rows and contexts: what a reader of the newest generation sees."""
    return {
        name: data
        for name, data in tree(path).items()
        if name.startswith(("train/" + below, "heldout/" + below)) and "/c/" in name
    }


def extended(path: Path, tokens: int) -> None:
    with small_blocks():
        stage.extend(path, tokens, **HERE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 rows: seven whole units and a short one."""
    path = tmp_path_factory.mktemp("small") / "cache"
    run_cache(path, holdout="0")
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "cache"
    run_cache(path, holdout="0", tokens=900)
    return path


def test_an_extended_cache_holds_the_bytes_of_one_made_at_once(small: Path, large: Path, tmp_path: Path) -> None:
    path = copy_cache(small, tmp_path / "cache")
    extended(path, 700)
    extended(path, 900)
    assert differing(shards(path), shards(large)) == []
    assert open_cache(path).generation == 2
    assert np.array_equal(served(open_cache(path)), served(open_cache(large)))
    statistics = [open_cache(cache).split("train").statistics("layer0", "out") for cache in (path, large)]
    assert np.array_equal(statistics[0].variance, statistics[1].variance)
    assert verify_bytes(path) == []


def test_an_older_generation_opens_with_its_own_order_and_statistics(small: Path, tmp_path: Path) -> None:
    path = copy_cache(small, tmp_path / "cache")
    extended(path, 900)
    old, original = open_cache(path, 0), open_cache(small)
    assert (old.split("train").n_rows, open_cache(path).split("train").n_rows) == (500, 900)
    for key, values in rows(original).items():
        assert np.array_equal(rows(old)[key], values), key
    assert np.array_equal(served(old), served(original))
    assert old.split("train").statistics("layer0", "in").mean.tolist() == (
        original.split("train").statistics("layer0", "in").mean.tolist()
    )
    contexts = np.arange(original.split("train").n_contexts)
    assert np.array_equal(old.split("train").context_tokens(contexts), original.split("train").context_tokens(contexts))


def test_extending_leaves_held_out_rows_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    before = run_cache(path).cache
    heldout = rows(before, "heldout")
    size = before.split("heldout").n_rows
    extended(path, 900)
    after = open_cache(path)
    assert after.split("heldout").n_rows == size == len(heldout["context"])
    for key, values in rows(after, "heldout").items():
        assert np.array_equal(values, heldout[key]), key
    trained, held = (set(rows(after, split)["document"].tolist()) for split in ("train", "heldout"))
    assert trained & held == set()
    assert verify_bytes(path) == []


@pytest.mark.parametrize(
    "kill",
    quick([Kill(2, "train/contexts"), Kill(4, "train/sites"), Kill(1, "manifest-1.json")], Kill(4, "train/sites")),
)
def test_the_old_generation_is_whole_at_every_moment_of_an_extension(small: Path, tmp_path: Path, kill: Kill) -> None:
    path = copy_cache(small, tmp_path / "cache")
    original = rows(open_cache(path))
    assert run_job(Job("extend", path, tokens=900), kill) != 0
    interrupted = open_cache(path)
    assert interrupted.generation == 0
    for key, values in rows(interrupted).items():
        assert np.array_equal(values, original[key]), key
    assert verify_bytes(path) == []


@pytest.mark.slow
def test_extending_to_all_takes_the_whole_dataset_and_then_nothing_more(small: Path, tmp_path: Path) -> None:
    whole = run_cache(tmp_path / "whole", holdout="0", tokens="all").cache.split("train").n_rows
    path = copy_cache(small, tmp_path / "cache")
    with small_blocks():
        assert stage.extend(path, "all", **HERE).cache.split("train").n_rows == whole
        assert stage.extend(path, "all", **HERE).n_new_rows == 0
    assert run_cache(path, holdout="0", tokens="all").n_new_rows == 0
    with pytest.raises(TextError, match=f"has no row beyond the {whole:,}"):
        extended(path, whole + 1)
    widened(path, "1")  # the refused extension left nothing unfinished


def test_an_extension_beyond_the_text_says_how_to_continue_and_does(small: Path, tmp_path: Path) -> None:
    path = copy_cache(small, tmp_path / "cache")
    with pytest.raises(TextError, match=r"ends after [\d,]+ training rows of the 1,000,000 wanted") as refused:
        extended(path, 1_000_000)
    n_rows = int(str(refused.value).split("--tokens ")[1].split(" ")[0])
    extended(path, n_rows)
    assert open_cache(path).split("train").n_rows == n_rows
    assert verify_bytes(path) == []


def test_extending_to_as_many_rows_changes_nothing_and_to_fewer_is_refused(small: Path) -> None:
    before = tree(small)
    assert stage.extend(small, 500, **HERE).n_new_rows == 0
    with pytest.raises(SettingsError, match="holds 500 training rows already"):
        stage.extend(small, 499, **HERE)
    assert differing(tree(small), before) == []


def widened(path: Path, layers: str) -> None:
    with small_blocks():
        stage.widen(path, layers, (), **HERE)


@pytest.fixture(scope="module")
def both_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("both") / "cache"
    run_cache(path, layers="0,1", storage_dtype="int8")
    return path


def test_a_widened_cache_holds_the_bytes_of_one_made_with_all_layers(both_layers: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    before = run_cache(path, storage_dtype="int8").cache
    original = rows(before)
    widened(path, "1")
    assert differing(shards(path), shards(both_layers)) == []
    after, expected = open_cache(path), open_cache(both_layers)
    assert list(after.sites) == ["layer0", "layer1"]
    for side in ("in", "out"):
        statistics = [cache.split("heldout").statistics("layer1", side) for cache in (after, expected)]
        assert np.array_equal(statistics[0].mean, statistics[1].mean)
    assert all(np.array_equal(values, original[key]) for key, values in rows(open_cache(path, 0)).items())
    assert verify_bytes(path) == []


@pytest.mark.slow
def test_a_widened_cache_can_be_extended_and_the_other_way_round(tmp_path: Path) -> None:
    paths = [tmp_path / "first widened", tmp_path / "first extended"]
    for path in paths:
        run_cache(path, holdout="0")
    widened(paths[0], "1")
    extended(paths[0], 700)
    extended(paths[1], 700)
    widened(paths[1], "1")
    assert differing(shards(paths[0]), shards(paths[1])) == []
    assert [verify_bytes(path) for path in paths] == [[], []]


def test_widening_by_layers_that_are_there_changes_nothing(both_layers: Path) -> None:
    before = tree(both_layers)
    assert stage.widen(both_layers, "all", (), **HERE).n_new_rows == 0
    assert differing(tree(both_layers), before) == []


def test_widening_refuses_unknown_layers_and_taken_names(small: Path) -> None:
    before = tree(small)
    with pytest.raises(ModelError, match="this model has 2 layers, 0 to 1"):
        widened(small, "7")
    with pytest.raises(ArtifactMismatch, match=r"its site layer0 is blocks.0.mlp.hook_in -> blocks.0.mlp.hook_out"):
        stage.widen(small, None, ["layer0=blocks.1.mlp.hook_in:blocks.1.mlp.hook_out"], **HERE)
    assert differing(tree(small), before) == []


def test_growing_refuses_another_model_another_text_and_a_busy_cache(small: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactMismatch, match=r"model\.files_digest \(.*\): there it is 'sha256:\w{12}…', asked for 'sha256:"
    ):
        stage.widen(small, "1", (), compute=Compute(threads=1, quiet=True), model=str(model_folder(seed=5)))
    other = tmp_path / "speeches.jsonl"
    other.write_text(text_file().read_text().replace("Fellow", "Dear"))
    with pytest.raises(ArtifactMismatch, match=r"text\.files: there it is"):
        stage.extend(small, 900, compute=Compute(threads=1, quiet=True), dataset=str(other))
    from tailrace.storage.draft import Lock

    lock = Lock(small)
    try:
        with pytest.raises(ArtifactBusy, match="another process is writing here"):
            extended(small, 900)
    finally:
        lock.release()


def test_growing_follows_a_model_and_a_text_that_moved(small: Path, large: Path, tmp_path: Path) -> None:
    path = copy_cache(small, tmp_path / "cache")
    model = tmp_path / "elsewhere" / model_folder().name
    shutil.copytree(model_folder(), model)
    moved = tmp_path / "text" / text_file().name
    moved.parent.mkdir()
    shutil.copy(text_file(), moved)
    with small_blocks():
        stage.extend(path, 900, compute=Compute(threads=1, quiet=True), model=str(model), dataset=str(moved))
    assert differing(shards(path), shards(large)) == []


@pytest.mark.slow
def test_an_unfinished_extension_must_be_finished_before_widening(small: Path, tmp_path: Path) -> None:
    path = copy_cache(small, tmp_path / "cache")
    assert run_job(Job("extend", path, tokens=900), Kill(1, "train-unit")) != 0
    with pytest.raises(ArtifactMismatch, match="an unfinished `extend` lies here; finish it first"):
        widened(path, "1")
    extended(path, 900)
    widened(path, "1")
    assert verify_bytes(path) == []
