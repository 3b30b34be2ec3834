"""A published generation stays as it was while the cache grows, and after: same rows, same order, same statistics."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tailrace.storage.activation_cache import ActivationCache, open_cache, reopen_cache
from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_publish import keep_superseded
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMissing, SettingsError
from tailrace.storage.formats import Compression
from tests.support.quick import quick
from tests.support.synthetic_cache import (
    expected_rows,
    extend_in_steps,
    memory_directory,
    widen_in_steps,
    write_synthetic_cache,
)

KEYS = ["layer0/in", "layer0/out", "token_id", "context", "position", "document"]


@pytest.fixture
def path() -> Iterator[Path]:
    with memory_directory() as name:
        yield Path(name) / "cache"


def content(cache: ActivationCache) -> dict[str, bytes]:
    """Return everything that reading a cache gives: epochs, units, contexts, statistics."""
    found = {"digest": cache.manifest.digest.encode()}
    for name in cache.manifest.splits:
        split = cache.split(name)
        with split.stream(KEYS, batch_rows=100, n_epochs=1) as stream:
            for batch in stream:
                found |= {f"{name} {batch.step} {key}": rows.tobytes() for key, rows in batch.arrays.items()}
        for unit in range(split.n_units):
            found |= {f"{name} unit {unit} {key}": rows.tobytes() for key, rows in split.read_unit(unit, KEYS).items()}
        found[f"{name} contexts"] = split.context_tokens(np.arange(split.n_contexts)).tobytes()
        found[f"{name} documents"] = split.context_documents(np.arange(split.n_contexts)).tobytes()
        for side in ("in", "out"):
            found[f"{name} mean {side}"] = split.statistics("layer0", side).mean.tobytes()
    return found


def check_rows(cache: ActivationCache, split_name: str, keys: list[str]) -> None:
    split = cache.split(split_name)
    for unit in range(split.n_units):
        rows = split.read_unit(unit, [*keys, "context", "position"])
        number = 0 if split_name == "train" else 1
        identity = np.stack([np.full(len(rows["context"]), number), rows["context"], rows["position"]], 1).astype(int)
        first = split.first_row(unit)
        assert (identity[:, 1] * 15 + identity[:, 2] - 1 == np.arange(first, first + len(identity))).all()
        for key in keys:
            assert np.array_equal(rows[key], expected_rows(cache, identity, key)), (unit, key)


@pytest.mark.parametrize("compression", quick(["none", "zstd"], "none"))
def test_a_generation_is_whole_at_every_moment_while_it_is_extended(path: Path, compression: Compression) -> None:
    # 40 contexts: a short unit of 88 rows and a short block of 8 contexts; 60: other short ones
    before = content(write_synthetic_cache(path, compression=compression))
    moments = 0
    for moment in extend_in_steps(path, n_contexts=60):
        assert content(open_cache(path, 0)) == before, moment
        if moment != "published":
            assert content(open_cache(path)) == before, moment
        assert verify_bytes(path) == [], moment
        moments += 1
    assert moments == 1 + 2 + 4 + 1
    after = open_cache(path)
    assert (after.generation, after.split("train").n_rows, after.split("train").n_contexts) == (1, 900, 60)
    check_rows(after, "train", ["layer0/in", "layer0/out"])
    check_rows(after, "heldout", ["layer0/in", "layer0/out"])


def test_a_reader_of_the_old_generation_is_not_disturbed_by_an_extension(path: Path) -> None:
    old = write_synthetic_cache(path, bucket_rows=128)
    before = content(old)
    stream = old.split("train").stream(["context", "position"], batch_rows=20, n_epochs=1)
    served = [next(stream).arrays["context"].copy()]
    for _ in extend_in_steps(path, n_contexts=60):
        served.append(next(stream).arrays["context"].copy())
    served += [batch.arrays["context"].copy() for batch in stream]
    assert sum(map(len, served)) == 600
    assert content(old) == before


@pytest.mark.parametrize("n_contexts", quick([41, 43, 64], 43))
def test_extending_twice_keeps_both_older_generations(path: Path, n_contexts: int) -> None:
    # 41 and 43 contexts: all three generations end within the same unit of 128 rows and the same block of 16 contexts
    contents = [content(write_synthetic_cache(path))]
    for contexts in (n_contexts, n_contexts + 1):
        for _ in extend_in_steps(path, n_contexts=contexts):
            pass
        contents.append(content(open_cache(path)))
    assert [content(open_cache(path, generation)) for generation in range(3)] == contents
    assert verify_bytes(path) == []
    check_rows(open_cache(path), "train", ["layer0/in", "layer0/out"])


def test_an_extension_that_was_cut_off_anywhere_ends_the_same_when_done_again(path: Path) -> None:
    def growth(root: Path) -> Iterator[str]:
        return extend_in_steps(root, n_contexts=60)

    whole = path.with_name("whole")
    write_synthetic_cache(whole)
    moments = list(growth(whole))
    expected = {file.relative_to(whole): file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    for cut in range(1, len(moments)):
        root = path.with_name(f"cut-{cut}")
        before = content(write_synthetic_cache(root))
        steps = growth(root)
        for _ in range(cut):
            next(steps)
        assert content(open_cache(root)) == before
        for _ in growth(root):
            pass
        found = {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        assert found == expected, cut


def test_a_widened_cache_has_more_sites_for_the_same_rows(path: Path) -> None:
    before = content(write_synthetic_cache(path))
    for moment in widen_in_steps(path, widths=[("layer1", 4, 12)]):
        assert content(open_cache(path, 0)) == before, moment
        assert verify_bytes(path) == [], moment
    after = open_cache(path)
    assert list(after.sites) == ["layer0", "layer1"]
    assert after.split("train").width("layer1/out") == 12
    check_rows(after, "train", ["layer0/in", "layer0/out", "layer1/in", "layer1/out"])
    check_rows(after, "heldout", ["layer1/in", "layer1/out"])
    assert {key: value for key, value in content(after).items() if key != "digest"} == {
        key: value for key, value in before.items() if key != "digest"
    }
    assert after.split("train").statistics("layer1", "out").n_rows == 600
    with pytest.raises(SettingsError, match="no array 'layer1/in'"):
        open_cache(path, 0).split("train").check_keys(["layer1/in"])


def test_a_widened_cache_can_be_extended_and_keeps_all_its_generations(path: Path) -> None:
    first = content(write_synthetic_cache(path))
    for _ in widen_in_steps(path, widths=[("layer1", 4, 12)]):
        pass
    second = content(open_cache(path))
    for _ in extend_in_steps(path, n_contexts=50):
        pass
    assert content(open_cache(path, 0)) == first
    assert content(open_cache(path, 1)) == second
    check_rows(open_cache(path, 1), "train", ["layer1/in", "layer1/out"])
    check_rows(open_cache(path), "train", ["layer0/in", "layer0/out", "layer1/in", "layer1/out"])
    assert verify_bytes(path) == []


def test_only_published_generations_are_opened(path: Path) -> None:
    write_synthetic_cache(path)
    # the second manifest is written before the copy that publishes it; a kill may fall between
    growth = extend_in_steps(path, n_contexts=60)
    for _ in growth:
        pass
    (path / "manifest.json").write_bytes((path / "manifest-0.json").read_bytes())
    assert open_cache(path).generation == 0
    for missing in (1, -1):
        with pytest.raises(ArtifactMissing, match=rf"has no generation {missing}; (.|\n)*generation 0: 600 train"):
            open_cache(path, missing)
    # its metadata lies there already; what is published is whole all the same
    assert verify_bytes(path) == []


def test_generations_know_their_cache(path: Path) -> None:
    first = write_synthetic_cache(path)
    for _ in extend_in_steps(path, n_contexts=60):
        pass
    second = open_cache(path)
    assert second.cache_id == first.cache_id
    assert second.manifest.previous == first.manifest.digest
    assert (first.reference["generation"], second.reference["generation"]) == (0, 1)
    assert first.reference["digest"] != second.reference["digest"]


def test_without_links_the_superseded_shards_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_synthetic_cache(tmp_path / "cache", n_contexts=10, shard_rows=64)
    before = cache.split("train").read_unit(2, ["layer0/in"])["layer0/in"].copy()

    def refuse(source: Path, target: Path) -> None:  # an injected refusal
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    keep_superseded(cache)
    aside = tmp_path / "cache" / "superseded" / "0" / "train" / "sites" / "layer0" / "in" / "c" / "2" / "0"
    assert aside.stat().st_nlink == 1
    assert np.array_equal(cache.split("train").read_unit(2, ["layer0/in"])["layer0/in"], before)


def test_what_was_begun_with_a_generation_reads_it_again_after_the_cache_has_grown(path: Path) -> None:
    cache = write_synthetic_cache(path)
    run, others = path.parent / "sweep", path.parent / "others"
    for folder, reference in ((run / "layer0", cache.reference), (others, {**cache.reference, "cache_id": "another"})):
        folder.mkdir(parents=True)
        request = {"runs": {"a": {"inputs": {"cache": reference}}}}
        (folder / "request.json").write_bytes(canonical_json(request))
    for _ in extend_in_steps(path, n_contexts=2 * cache.split("train").n_contexts):
        pass
    assert [reopen_cache(path, output).generation for output in (run, others, path.parent / "new")] == [0, 1, 1]
    (run / "layer0" / "request.json").write_text("[")
    assert reopen_cache(path, run).generation == 1
