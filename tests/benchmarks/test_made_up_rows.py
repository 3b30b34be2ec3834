"""The cache that benchmarks make up is one that the package opens and streams."""

from __future__ import annotations

from pathlib import Path

from benchmarks.made_up_rows import KEYS, cache_format, write_cache


def test_a_made_up_cache_opens_and_serves_every_row_once(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", cache_format(8, shard_rows=256, chunk_rows=64), 600)
    with cache.split("train").stream([*KEYS, "context", "position"], batch_rows=100, n_epochs=1) as stream:
        rows = [row for batch in stream for row in zip(batch.arrays["context"], batch.arrays["position"], strict=True)]
    assert sorted(rows) == [(row // 128, row % 128) for row in range(600)]
