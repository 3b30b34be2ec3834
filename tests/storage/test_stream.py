"""A stream serves every row once an epoch, whole and with its pair, and goes on exactly where it stopped."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.artifact import MANIFEST, describe_files, read_json, seal
from tailrace.storage.bfloat16 import bits_to_float32
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, SettingsError
from tailrace.storage.formats import Compression
from tailrace.storage.generations import Generations
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.stream import RowStream
from tests.support.quick import diagonal
from tests.support.synthetic_cache import (
    expected_rows,
    extend_in_steps,
    memory_directory,
    running_threads,
    store_as,
    write_synthetic_cache,
)

KEYS = ["layer0/in", "layer0/out", "token_id", "context", "position", "document"]
COMPRESSIONS: tuple[Compression, ...] = ("none", "lz4", "zstd", "gzip", "blosc-zstd")


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def cache() -> Iterator[ActivationCache]:
    """600 training rows in units of 128, the last of 88, and buckets of 128."""
    with memory_directory() as name:
        yield write_synthetic_cache(Path(name) / "cache", bucket_rows=128)


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


def read_epoch(split: CacheSplit, **options: Any) -> dict[str, np.ndarray]:
    """Return an epoch's rows by key, in the order in which they were served."""
    options = {"batch_rows": 50, "n_epochs": options.get("epoch", 0) + 1, **options}
    with split.stream(KEYS, **options) as stream:
        batches = [{key: rows.copy() for key, rows in batch.arrays.items()} for batch in stream]
    return {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}


def identities(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Return (split, context, position) of training rows."""
    context, position = rows["context"].astype(int), rows["position"].astype(int)
    return np.stack([np.zeros_like(context), context, position], 1)


def check_rows(cache: ActivationCache, rows: dict[str, np.ndarray]) -> None:
    """Check that every row of the cache is there once, and that each of its parts is the one that belongs to it."""
    length = cache.layout.context_length
    n_contexts = cache.split("train").n_contexts
    wanted = [(context, position) for context in range(n_contexts) for position in range(1, length)]
    assert sorted(zip(rows["context"].tolist(), rows["position"].tolist(), strict=True)) == wanted
    identity = identities(rows)
    tokens = cache.split("train").context_tokens(rows["context"])
    assert np.array_equal(rows["token_id"], tokens[np.arange(len(identity)), identity[:, 2]])
    assert np.array_equal(rows["document"], identity[:, 1] // 2)
    for key in ("layer0/in", "layer0/out"):
        expected = expected_rows(cache, identity, key)
        dtype = cache.sites["layer0"].dtype
        if dtype == "int8":
            # half a step of the row's largest value in units of the column's size: rows reach 3.25, sizes about 2.2
            assert np.abs(rows[key] - expected).max() < 0.02
        else:
            assert np.array_equal(rows[key], store_as(expected, dtype))


@pytest.mark.parametrize(("dtype", "compression"), diagonal(["float32", "float16", "bfloat16", "int8"], COMPRESSIONS))
def test_shuffling_loses_no_row_and_tears_no_pair_for_every_dtype_and_codec(
    directory: Path, dtype: str, compression: Compression
) -> None:
    cache = write_synthetic_cache(
        directory / "cache", dtype=dtype, compression=compression, n_heldout_contexts=0, bucket_rows=128
    )
    split = cache.split("train")
    gathered = read_epoch(split, order="gathered")
    check_rows(cache, gathered)
    materialise_epoch(split, seed=cache.seed, epoch=0, run_tasks=in_turn)
    materialised = read_epoch(split, order="materialised")
    for key in KEYS:
        assert np.array_equal(gathered[key], materialised[key]), key


@pytest.mark.parametrize(
    ("n_contexts", "shard_rows", "bucket_rows", "batch_rows"),
    [
        (40, 128, 128, 50),  # batches straddle buckets; the last unit and bucket are short
        (40, 128, 128, 128),  # a batch is a bucket
        (40, 128, 256, 300),  # a batch is longer than a bucket
        (40, 64, 64, 1000),  # the batch is the epoch, through ten buckets
        (40, 128, 1024, 7),  # one bucket
        (8, 128, 128, 32),  # one unit, short
        (32, 32, 32, 32),  # 480 rows: units and buckets divide the rows
        (1, 128, 128, 1),  # 15 rows one by one
    ],
)
def test_no_row_is_lost_whatever_the_sizes(
    directory: Path, n_contexts: int, shard_rows: int, bucket_rows: int, batch_rows: int
) -> None:
    cache = write_synthetic_cache(
        directory / "cache", n_contexts=n_contexts, n_heldout_contexts=0, shard_rows=shard_rows, bucket_rows=bucket_rows
    )
    split = cache.split("train")
    gathered = read_epoch(split, batch_rows=batch_rows, order="gathered")
    check_rows(cache, gathered)
    materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)
    materialised = read_epoch(split, batch_rows=batch_rows, order="materialised")
    for key in KEYS:
        assert np.array_equal(gathered[key], materialised[key]), key


def test_buckets_that_are_no_whole_shards_are_gathered_but_not_materialised(directory: Path) -> None:
    # two buckets would write parts of one shard
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=100)
    check_rows(cache, read_epoch(cache.split("train")))
    with pytest.raises(SettingsError, match=r"buckets of 100 rows.*shards of 128"):
        materialise_epoch(cache.split("train"), seed=0, epoch=0, run_tasks=in_turn)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(cache: ActivationCache) -> None:
    split = cache.split("train")
    first = read_epoch(split, seed=1)
    for options in ({"n_threads": 1}, {"n_threads": 8}, {"batch_rows": 77}):
        assert np.array_equal(identities(read_epoch(split, seed=1, **options)), identities(first)), options
    for options in ({"seed": 2}, {"seed": 1, "epoch": 1}):
        other = read_epoch(split, **options)
        check_rows(cache, other)
        assert not np.array_equal(identities(other), identities(first)), options


def test_unit_order_is_undone_when_a_unit_is_read(cache: ActivationCache) -> None:
    split = cache.split("train")
    units = [split.read_unit(unit, KEYS) for unit in range(split.n_units)]
    rows = {key: np.concatenate([unit[key] for unit in units]) for key in KEYS}
    in_token_order = np.lexsort((rows["position"], rows["context"]))
    assert np.array_equal(in_token_order, np.arange(600))
    check_rows(cache, rows)
    assert [split.first_row(unit) for unit in range(split.n_units)] == [0, 128, 256, 384, 512]


def test_a_sample_serves_the_same_rows_every_epoch_in_another_order(cache: ActivationCache) -> None:
    epochs = [identities(read_epoch(cache.split("train"), n_rows=70, epoch=epoch)) for epoch in range(3)]
    assert len(epochs[0]) == 70
    assert len({tuple(map(tuple, sorted(rows.tolist()))) for rows in epochs}) == 1
    assert len({tuple(map(tuple, rows.tolist())) for rows in epochs}) == 3


def test_an_sae_site_serves_one_array_as_both_sides(directory: Path) -> None:
    cache = write_synthetic_cache(directory / "cache", sae=True)
    with cache.split("train").stream(["layer0/in", "layer0/out"], batch_rows=50) as stream:
        batch = next(stream)
    assert batch.arrays["layer0/in"] is batch.arrays["layer0/out"]


def collect(stream: Iterator[Any], n_batches: int | None = None) -> list[tuple[int, int, bytes]]:
    found = []
    for batch in stream:
        found.append((batch.epoch, batch.step, b"".join(rows.tobytes() for rows in batch.arrays.values())))
        if len(found) == n_batches:
            break
    return found


@pytest.mark.parametrize(
    ("materialised", "n_rows", "drop_last"), diagonal(["none", "first", "second"], [None, 333], [False, True])
)
def test_a_stream_resumed_at_any_batch_serves_what_would_have_come(
    directory: Path, materialised: str, n_rows: int | None, drop_last: bool
) -> None:
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=128)
    split = cache.split("train")
    if materialised != "none":
        materialise_epoch(split, seed=0, epoch=["first", "second"].index(materialised), run_tasks=in_turn)

    def stream(epoch: int, step: int) -> RowStream:
        return split.stream(
            ["layer0/out", "context"],
            batch_rows=90,
            n_epochs=2,
            n_rows=n_rows,
            drop_last=drop_last,
            epoch=epoch,
            step=step,
        )

    with stream(0, 0) as whole:
        states = [whole.state]
        expected = []
        for batch in whole:
            expected += collect(iter([batch]))
            states.append(whole.state)
    n_steps = -(-(n_rows or 600) // 90) - (1 if drop_last else 0)
    assert len(expected) == 2 * n_steps
    assert [(state.epoch, state.step) for state in states] == [divmod(i, n_steps) for i in range(2 * n_steps + 1)]
    for index, state in enumerate(states):
        with stream(state.epoch, state.step) as resumed:
            assert resumed.state == state
            assert collect(resumed) == expected[index:], state


def test_batches_of_an_epoch_have_the_size_asked_for_but_the_last(cache: ActivationCache) -> None:
    with cache.split("train").stream(["context"], batch_rows=90, n_epochs=1) as stream:
        assert stream.n_steps_per_epoch == 7
        assert [batch.n_rows for batch in stream] == [90] * 6 + [60]
    with cache.split("train").stream(["context"], batch_rows=90, n_epochs=1, drop_last=True) as stream:
        assert [batch.n_rows for batch in stream] == [90] * 6


def test_closing_a_stream_anywhere_leaves_no_threads(cache: ActivationCache) -> None:
    before = running_threads()
    for n_batches in (0, 1, 5, 14, 15):
        with cache.split("train").stream(KEYS, batch_rows=50, n_epochs=2) as stream:
            collect(stream, n_batches) if n_batches else None
        assert running_threads() <= before, n_batches
        with pytest.raises(StopIteration):
            next(stream)


def test_a_stream_that_nobody_has_any_more_ends_and_lets_its_generation_go(directory: Path) -> None:
    write_synthetic_cache(directory / "cache", n_contexts=40)
    for _ in extend_in_steps(directory / "cache", n_contexts=50):
        pass
    before = running_threads()
    gc.disable()
    try:
        stream = open_cache(directory / "cache", 0).split("train").stream(["layer0/in"], batch_rows=16)
        next(stream)
        started = running_threads() - before
        assert started
        del stream
        for thread in started:
            thread.join(10)
        assert not running_threads() - before
    finally:
        gc.enable()
    Generations(directory / "cache").prune(1)


def test_damage_is_told_to_whoever_ends_within_the_first_bucket(directory: Path) -> None:
    rows: dict[str, Any] = {"n_contexts": 200, "n_heldout_contexts": 0, "context_length": 9}
    write_synthetic_cache(directory / "cache", **rows, shard_rows=64, chunk_rows=16, bucket_rows=512)
    split = open_cache(directory / "cache").split("train")
    for shard in (split.root / "train/sites/layer0/in").rglob("c/*/0"):
        data = bytearray(shard.read_bytes())
        data[3] ^= 1
        shard.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match="checksum is"), split.stream(["layer0/in"], batch_rows=16) as stream:
        next(stream)
    stream = split.stream(["layer0/in"], batch_rows=16)
    next(stream)
    with pytest.raises(ArtifactCorrupt, match="checksum is"):
        stream.confirm()
    stream.close()


def test_a_stream_without_end_goes_on_and_closes(cache: ActivationCache) -> None:
    with cache.split("train").stream(["context"], batch_rows=600) as stream:
        assert [batch.epoch for batch in (next(stream), next(stream), next(stream))] == [0, 1, 2]


@pytest.mark.parametrize("order", ["gathered", "materialised"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("how", ["deleted", "cut short"])
def test_a_damaged_shard_stops_the_stream_and_is_named(
    directory: Path, order: str, compression: Compression, how: str
) -> None:
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=128, compression=compression)
    split, group = cache.split("train"), directory / "cache" / "train"
    if order == "materialised":
        group = materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)
    shard = group / "sites/layer0/out/c/2/0"
    if how == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    before = running_threads()
    stream = split.stream(KEYS, batch_rows=50, n_epochs=1, order=order)
    with pytest.raises(ArtifactCorrupt, match="sites/layer0/out/c/2/0"):
        collect(stream)
    assert running_threads() <= before
    with pytest.raises(StopIteration):
        next(stream)


def test_a_damaged_shard_is_named_when_a_unit_or_a_context_is_read(directory: Path) -> None:
    split = write_synthetic_cache(directory / "cache").split("train")
    (directory / "cache/train/sites/layer0/in/c/1/0").unlink()
    (directory / "cache/train/contexts/tokens/c/2/0").unlink()
    with pytest.raises(ArtifactCorrupt, match="sites/layer0/in/c/1/0"):
        split.read_unit(1, ["layer0/in"])
    with pytest.raises(ArtifactCorrupt, match="contexts/tokens/c/2/0"):
        split.context_tokens(np.array([0, 33]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows": 601, "drop_last": True}, "batches of 601 rows cannot be drawn from 600 train rows"),
        ({"batch_rows": 0}, "batches of 0 rows"),
        ({"batch_rows": -5}, "batches of -5 rows"),
        ({"batch_rows": 10, "step": -1}, "cannot begin at epoch 0, step -1"),
        ({"batch_rows": 10, "epoch": -1}, "cannot begin at epoch -1"),
        ({"batch_rows": 10, "n_rows": 601}, "n_rows is 601, but must be 1 to 600"),
        ({"batch_rows": 10, "n_rows": 0}, "n_rows is 0, but must be"),
        ({"batch_rows": 10, "order": "sorted"}, "order 'sorted'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(
    cache: ActivationCache, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        cache.split("train").stream(["context"], **options)


def test_unknown_keys_are_refused_with_those_there_are(cache: ActivationCache) -> None:
    with pytest.raises(
        SettingsError, match=r"no array 'layer9/in', 'tokens'; there are layer0/in, layer0/out, token_id"
    ):
        cache.split("train").stream(["layer9/in", "context", "tokens"], batch_rows=10)


def test_an_epoch_that_was_not_materialised_is_refused_with_the_way_out(cache: ActivationCache) -> None:
    with (
        cache.split("train").stream(["context"], batch_rows=10, order="materialised") as stream,
        pytest.raises(SettingsError, match="epoch 0 of train rows with seed 0 was not materialised; run `pipeline sh"),
    ):
        next(stream)


def test_a_split_that_is_not_there_is_refused(directory: Path) -> None:
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=128)
    with pytest.raises(ArtifactMismatch, match="has no heldout rows, only train"):
        cache.split("heldout")


def test_materialising_again_changes_nothing_and_resumes_at_the_bucket(directory: Path) -> None:
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=128)
    split = cache.split("train")

    def only_some(task: Callable[[int], None], ids: Iterable[int]) -> None:
        for number in list(ids)[::2]:
            task(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise_epoch(split, seed=0, epoch=0, run_tasks=only_some)
    done: list[int] = []

    def backwards(task: Callable[[int], None], ids: Iterable[int]) -> None:
        for number in sorted(ids, reverse=True):
            done.append(number)
            task(number)

    path = materialise_epoch(split, seed=0, epoch=0, run_tasks=backwards)
    assert done == [3, 1]
    manifest = (path / "manifest.json").read_bytes()
    assert materialise_epoch(split, seed=0, epoch=0, run_tasks=backwards) == path
    assert (path / "manifest.json").read_bytes() == manifest
    other = write_synthetic_cache(directory / "other", n_heldout_contexts=0, bucket_rows=128).split("train")
    again = materialise_epoch(other, seed=0, epoch=0, run_tasks=in_turn)
    assert (again / "manifest.json").read_bytes() == manifest


def test_a_materialised_epoch_is_used_only_for_its_own_order(directory: Path) -> None:
    cache = write_synthetic_cache(directory / "cache", n_heldout_contexts=0, bucket_rows=128)
    split = cache.split("train")
    group = materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)
    # a mark in the first shard of the copy shows who reads it
    shard = group / "token_id/c/0"
    shard.write_bytes(np.full(128, 77, "<i4").tobytes() + shard.read_bytes()[512:])
    manifest = read_json(group / MANIFEST)
    del manifest["digest"]
    manifest["shards"] |= describe_files(group, ["token_id/c/0"])
    (group / MANIFEST).write_bytes(seal(manifest))
    assert (read_epoch(split)["token_id"][:128] == 77).all()
    for options in ({"seed": 1}, {"epoch": 1}, {"n_rows": 599}, {"order": "gathered"}):
        assert not (read_epoch(split, **options)["token_id"] == 77).any(), options


def test_two_caches_with_the_same_request_have_the_same_bytes(directory: Path) -> None:
    for name in ("one", "two"):
        write_synthetic_cache(directory / name, dtype="int8", compression="zstd")
    files = [path.relative_to(directory / "one") for path in (directory / "one").rglob("*") if path.is_file()]
    assert len(files) > 50
    assert all((directory / "one" / file).read_bytes() == (directory / "two" / file).read_bytes() for file in files)


def test_bfloat16_rows_are_served_as_bits_and_int8_rows_as_numbers(directory: Path) -> None:
    narrow = write_synthetic_cache(directory / "bfloat16", dtype="bfloat16").split("train")
    rows = narrow.read_unit(0, ["layer0/in"])["layer0/in"]
    assert narrow.dtype("layer0/in") == "bfloat16"
    assert rows.dtype == np.uint16
    assert np.abs(bits_to_float32(rows)).max() < 4
    quantised = write_synthetic_cache(directory / "int8", dtype="int8").split("train")
    assert quantised.dtype("layer0/in") == "float32"
    assert quantised.read_unit(0, ["layer0/in"])["layer0/in"].dtype == np.float32
    assert quantised.dtype("position") == "uint16"


def test_statistics_are_those_of_the_rows_before_storing(cache: ActivationCache) -> None:
    rows = read_epoch(open_cache(cache.path).split("train"))["layer0/in"].astype(np.float64)
    statistics = cache.split("train").statistics("layer0", "in")
    assert statistics.n_rows == 600
    np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=1e-4)


@pytest.mark.parametrize("order", ["gathered", "materialised", "kept"])
def test_segments_filled_run_by_run_hold_what_is_served(directory: Path, order: str) -> None:
    cache = write_synthetic_cache(directory / "cache", dtype="int8", bucket_rows=128)
    split = cache.split("train")
    if order == "materialised":
        materialise_epoch(split, seed=0, epoch=1, run_tasks=in_turn)
    kept = np.zeros(600, bool) if order == "kept" else None
    memory: dict[str, np.ndarray] = {}
    with split.stream(KEYS[:3], batch_rows=40, n_epochs=1) as stream:
        n_read = []
        for epoch in (1, 2):
            # provenance and activations, of shards and of a bucket, in pieces that no run or shard ends with
            reader = stream.open_order(epoch, 128, kept)
            served = []
            for segment in range(reader.n_segments):
                if kept is None or not memory:
                    n_rows = 600 if order == "kept" else 128
                    memory = {spec.name: np.zeros(spec.shape(n_rows), spec.memory_dtype) for spec in stream.specs}
                pieces = list(reader.pieces(segment, 100))
                for piece in pieces:
                    assert piece.n_rows * piece.spec.row_bytes <= 100
                    reader.read(piece, memory[piece.spec.name][piece.first : piece.first + piece.n_rows])
                n_read.append(sum(piece.n_rows for piece in pieces))
                rows = np.arange(reader.n_rows(segment)) if (own := reader.served(segment)) is None else own
                served.append({name: values[rows] for name, values in memory.items()})
            everything = {name: np.concatenate([part[name] for part in served]) for name in memory}
            expected = read_epoch(split, epoch=epoch)
            for name, source in stream.sources.items():
                assert np.array_equal(source.decode(everything), expected[name]), (epoch, name)
    n_arrays = len(stream.specs)
    assert sum(n_read) == 600 * n_arrays * (1 if order == "kept" else 2), "of what is kept nothing is read twice"


def test_a_record_that_lists_no_such_shard_is_damage(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheSplit, "_shards_of_unit", lambda *_: {})
    with pytest.raises(ArtifactCorrupt, match="no commit record of train lists "):
        cache.split("train").read_unit(0, ["layer0/in"])
