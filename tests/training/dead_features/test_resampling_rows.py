"""Fresh rows of a cache: right pairs from the right places, uniform, another sample at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.storage.activation_cache import open_cache
from tailrace.training.rows.batches import CacheBatches
from tailrace.training.rows.row_source import CacheRows
from tests.support.training_caches import CONTEXT_LENGTH, publish_cache, small_cache

N_ROWS = 640
"""Two full units of 256 rows and a short one."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CacheRows:
    """Return rows whose input is their number and whose output is its negative."""
    inputs = np.repeat(np.arange(N_ROWS, dtype=np.float32)[:, None], 3, axis=1)
    path = publish_cache(tmp_path_factory.mktemp("numbered") / "cache", {"mlp": {"train": (inputs, -inputs)}})
    split = open_cache(path).split("train")
    return CacheRows(split, split.cache.sites["mlp"], seed=5)


def test_inputs_outputs_context_and_position_are_of_the_same_row(source: CacheRows) -> None:
    batch, context, position = source(100, 3)
    assert context is not None
    assert position is not None
    assert torch.equal(batch.outputs, -batch.inputs)
    assert np.array_equal(context * CONTEXT_LENGTH + position, batch.inputs[:, 0].numpy())
    assert batch.inputs.shape == (100, 3)
    assert len(np.unique(batch.inputs[:, 0])) == 100


def test_a_sample_depends_on_the_step_alone(source: CacheRows) -> None:
    first, again, later = (source(100, step).batch.inputs for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert len(np.setdiff1d(later[:, 0], first[:, 0])) > 0


def test_every_row_is_equally_likely_at_every_place(source: CacheRows) -> None:
    n_samples, n_rows = 400, 64
    drawn = np.concatenate([source(n_rows, step).batch.inputs[:, 0].numpy() for step in range(n_samples)])
    counts = np.bincount(drawn.astype(int), minlength=N_ROWS)
    # each row is drawn in a tenth of the samples; eight standard deviations of that count are 48
    assert counts.min() > 0
    assert abs(counts - 40).max() < 48
    by_unit = np.add.reduceat(counts, [0, 256, 512]) / (n_samples * n_rows)
    # five standard deviations of a share of 25,600 draws are at most 0.016
    assert np.allclose(by_unit, [0.4, 0.4, 0.2], atol=0.016)
    first = drawn.reshape(n_samples, n_rows)[:, 0]
    # the mean of 400 uniform numbers below 640 has a deviation of 9.2
    assert abs(first.mean() - 319.5) < 5 * 9.2


def test_no_more_rows_are_given_than_there_are(source: CacheRows) -> None:
    rows = source(10**6, 1).batch.inputs[:, 0]
    assert sorted(rows.tolist()) == list(range(N_ROWS))


def test_samples_keep_to_the_rows_that_a_restricted_stream_serves(tmp_path: Path) -> None:
    split = open_cache(small_cache(tmp_path / "cache")).split("train")
    site = split.cache.sites["mlp"]
    with CacheBatches(split, [site], batch_rows=50, seed=9, n_rows=50) as stream:
        served = {tuple(row) for row in stream.next_batch()["mlp"].inputs.tolist()}
    restricted = CacheRows(split, site, seed=1, n_rows=50, order_seed=9)
    for step in range(5):
        assert {tuple(row) for row in restricted(20, step).batch.inputs.tolist()} <= served


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_types_arrive_as_float32(tmp_path: Path, dtype: str) -> None:
    rows = np.random.Generator(np.random.Philox(2)).standard_normal((300, 4)).astype(np.float32)
    bits = torch.from_numpy(rows).bfloat16().view(torch.int16).numpy().view(np.uint16)
    given = bits if dtype == "bfloat16" else rows.astype(np.float16)
    path = publish_cache(tmp_path / "cache", {"sae": {"train": (given, given)}}, dtype=dtype)
    split = open_cache(path).split("train")
    batch, context, position = CacheRows(split, split.cache.sites["sae"], seed=0)(64, 0)
    assert context is not None
    assert position is not None
    assert batch.inputs.dtype == torch.float32
    assert np.allclose(batch.inputs.numpy(), rows[context * CONTEXT_LENGTH + position], rtol=2**-8)
