"""A reader beside a growing cache gets its own generation's rows, wherever it is held up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tailrace.storage import activation_cache
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.artifact import Manifest
from tailrace.storage.cache_format import EPOCH_KIND, manifest_name
from tailrace.storage.cache_publish import keep_superseded
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.cache_writer import ContextBlocks
from tailrace.storage.formats import Compression
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.memory import aligned_rows
from tailrace.storage.shard import write_shard
from tests.support.synthetic_cache import extend_in_steps, memory_directory, write_synthetic_cache

KEYS = ["layer0/in", "layer0/out", "token_id", "context", "position"]
N_CONTEXTS = 3
"""45 rows: a second shard of 13 rows, in one chunk, and a short block of contexts."""
SAME_SIZE = 4
"""60 rows: the second shard has 28 rows in the same chunk, so that the file is as long as before."""
LONGER = 6
"""90 rows: the second shard is whole."""


@pytest.fixture
def path() -> Iterator[Path]:
    with memory_directory() as name:
        yield Path(name) / "cache"


def write_cache(path: Path, dtype: str = "float32", compression: Compression = "none") -> ActivationCache:
    return write_synthetic_cache(
        path, n_contexts=N_CONTEXTS, n_heldout_contexts=0, dtype=dtype, compression=compression, shard_rows=32
    )


def grow(path: Path, n_contexts: int) -> None:
    for _ in extend_in_steps(path, n_contexts=n_contexts):
        pass


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


def served(split: CacheSplit, order: str) -> dict[str, bytes]:
    with split.stream(KEYS, batch_rows=100, n_epochs=1, order=order) as stream:
        return {key: rows.tobytes() for batch in stream for key, rows in batch.arrays.items()}


def read_stream(split: CacheSplit) -> dict[str, bytes]:
    return served(split, "gathered")


def read_units(split: CacheSplit) -> dict[str, bytes]:
    rows = [split.read_unit(unit, KEYS) for unit in range(split.n_units)]
    return {f"{unit} {key}": values.tobytes() for unit, one in enumerate(rows) for key, values in one.items()}


def read_contexts(split: CacheSplit) -> bytes:
    contexts = np.arange(split.n_contexts)
    return split.context_tokens(contexts).tobytes() + split.context_documents(contexts).tobytes()


def read_statistics(split: CacheSplit) -> bytes:
    return split.statistics("layer0", "in").mean.tobytes() + split.statistics("layer0", "out").mean.tobytes()


def materialise(split: CacheSplit) -> dict[str, dict[str, object]]:
    path = materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)
    shards: dict[str, dict[str, object]] = Manifest.read(path, EPOCH_KIND).as_json()["shards"]
    return shards


def verify(split: CacheSplit) -> list[str]:
    return verify_bytes(split.root)


READERS: dict[str, Callable[[CacheSplit], object]] = {
    reader.__name__: reader for reader in (read_stream, read_units, read_contexts, read_statistics, materialise, verify)
}


def extend_between_looking_and_opening(patch: pytest.MonkeyPatch, growths: Iterator[int | None]) -> None:
    """Publish the next extension, unless it is None, when one of the shards that it replaces was looked up."""
    look = CacheSplit.group_of

    def held_up(split: CacheSplit, shard: str) -> Path:
        group = look(split, shard)
        if "/c/1" in shard or shard.startswith("contexts/"):
            n_contexts = next(growths, None)
            if n_contexts is not None:
                grow(split.root, n_contexts)
        return group

    patch.setattr(CacheSplit, "group_of", held_up)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("dtype", "compression", "n_contexts"),
    [
        ("float32", "none", SAME_SIZE),
        pytest.param("int8", "none", LONGER, marks=pytest.mark.slow),
        pytest.param("bfloat16", "zstd", SAME_SIZE, marks=pytest.mark.slow),
        ("int8", "lz4", LONGER),
    ],
)
def test_an_extension_between_looking_and_opening_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compression: Compression, reader: str, n_contexts: int
) -> None:
    read = READERS[reader]
    wanted = read(write_cache(path.with_name("alone"), dtype, compression).split("train"))
    split = write_cache(path, dtype, compression).split("train")
    extend_between_looking_and_opening(monkeypatch, iter([n_contexts]))
    assert read(split) == wanted


@pytest.mark.parametrize("skipped", range(4))
def test_no_array_of_a_row_comes_from_another_generation(
    path: Path, monkeypatch: pytest.MonkeyPatch, skipped: int
) -> None:
    # held up before the first, the second, … of the arrays of a unit
    wanted = read_units(write_cache(path.with_name("alone")).split("train"))
    split = write_cache(path).split("train")
    extend_between_looking_and_opening(monkeypatch, iter([None] * 2 * skipped + [SAME_SIZE, LONGER]))
    assert read_units(split) == wanted


def test_a_reader_held_up_while_two_extensions_come_is_not_led_to_the_second_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # between the first superseded group, which is not there yet, and the second one, which is by then
    wanted = write_cache(path.with_name("alone")).split("train").read_unit(1, ["layer0/in"])["layer0/in"]
    split, growths = write_cache(path).split("train"), iter([SAME_SIZE, SAME_SIZE + 1])

    def named(generation: int) -> str:
        for n_contexts in growths:
            grow(path, n_contexts)
        return manifest_name(generation)

    monkeypatch.setattr(activation_cache, "manifest_name", named)
    assert np.array_equal(split.read_unit(1, ["layer0/in"])["layer0/in"], wanted)


def test_a_published_block_is_read_after_a_longer_one_took_its_place_uncommitted(path: Path) -> None:
    cache = write_cache(path)
    wanted = cache.split("train").context_tokens(np.arange(N_CONTEXTS))
    keep_superseded(cache)
    spec = cache.layout.context_specs()[0]
    rows = aligned_rows(spec.shard_rows, spec.width, spec.memory_dtype)
    rows[...] = 7
    write_shard(path / "train" / spec.shard_name(0), rows, spec.shard_rows, spec)
    tokens, _ = ContextBlocks(path, cache.layout, 1, "train").read(0, N_CONTEXTS)
    assert np.array_equal(tokens, wanted)
    assert np.array_equal(open_cache(path).split("train").context_tokens(np.arange(N_CONTEXTS)), wanted)
