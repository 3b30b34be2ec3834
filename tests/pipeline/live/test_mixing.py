"""The order of live mode, without a model: every row once, two blocks to a stage, and how well batches are mixed."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from tailrace.pipeline.live.mixing import Mixing, choose_block_rows
from tailrace.storage.errors import SettingsError
from tailrace.storage.shuffle import philox, random_permutation
from tailrace.storage.shuffle_evidence import same_document_pairs


def served_rows(mixing: Mixing, n_blocks: int) -> np.ndarray:
    """Return the rows of the first blocks in the order they are served, to the last of them."""
    served = np.concatenate([mixing.served(stage) for stage in range(n_blocks + 1)])
    return served[served < n_blocks * mixing.block_rows]


@hypothesis.given(strategies.integers(0, 99), strategies.integers(1, 40), strategies.integers(1, 6))
def test_every_row_is_served_exactly_once(seed: int, half: int, n_blocks: int) -> None:
    mixing = Mixing(seed, 2 * half)
    assert sorted(served_rows(mixing, n_blocks)) == list(range(2 * half * n_blocks))


def test_a_stage_serves_half_of_its_own_block_and_half_of_the_one_before() -> None:
    mixing = Mixing(3, 64)
    assert [(mixing.served(stage) // 64).tolist().count(stage) for stage in range(4)] == [32, 32, 32, 32]
    assert [(mixing.served(stage) // 64).tolist().count(stage - 1) for stage in range(1, 4)] == [32, 32, 32]
    assert [len(mixing.served(stage)) for stage in range(3)] == [32, 64, 64]


def test_the_order_is_the_two_permutations_of_its_definition() -> None:
    seed, size, stage = 5, 12, 2
    older, newer = (np.arange(size)[random_permutation(philox(seed, "live", block), size)] for block in (1, 2))
    together = np.concatenate([size + older[6:], 2 * size + newer[:6]])
    expected = together[random_permutation(philox(seed, "live/stage", stage), size)]
    assert Mixing(seed, size).served(stage).tolist() == expected.tolist()


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    assert Mixing(1, 64).served(1).tolist() == Mixing(1, 64).served(1).tolist()
    assert Mixing(1, 64).served(1).tolist() != Mixing(2, 64).served(1).tolist()


def test_a_batch_holds_as_many_pairs_of_one_document_as_a_draw_from_the_buffer() -> None:
    # Two rows of a block share a stage with probability about 1/2, and a batch of it with (b − 1) / (H − 1): as often
    # as two of 2H rows of a uniform shuffle. Documents of 32 rows, in 20 blocks of 1024 rows, batches of 128.
    size, n_blocks, batch, document_rows = 1024, 20, 128, 32
    mixing = Mixing(0, size)
    served = np.concatenate([mixing.served(stage) for stage in range(1, n_blocks)])
    pairs = same_document_pairs((served // document_rows).astype(np.uint32), batch)
    n_documents = len(served) / document_rows
    from_buffer = n_documents * (document_rows * (document_rows - 1) / 2) * (batch - 1) / (2 * size - 1)
    # a stage's halves hold Hypergeometric shares of a document: 19 456 rows give pairs a deviation of about 1 %
    assert pairs / from_buffer == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("buffer_rows", "buffer_bytes", "expected"),
    [
        (262_144, 10**9, 131_072),  # the default: half the buffer is sixteen times two batches
        (262_144, 3 * 100_000 * 100, 98_304),  # memory for 100 000 rows of 100 bytes in three stages
        (20_000, 10**9, 8192),  # rounded down to two batches
        (16_384, 10**9, 8192),
    ],
)
def test_a_block_is_half_the_buffer_in_whole_batches_as_memory_allows(buffer_rows, buffer_bytes, expected) -> None:
    block_rows = choose_block_rows(buffer_rows, buffer_bytes, 100, 4096)
    assert block_rows == expected
    assert 3 * block_rows * 100 <= buffer_bytes


def test_a_buffer_that_is_too_small_is_refused_with_everything_it_lacks() -> None:
    with pytest.raises(SettingsError) as refused:
        choose_block_rows(buffer_rows=10_000, buffer_bytes=1_000_000, row_bytes=100, batch_rows=4096)
    message = str(refused.value)
    assert "buffer_rows is 10,000, wanted at least 16,384" in message
    assert "buffer_bytes is 1,000,000, wanted at least 2,457,600" in message
    assert "lower batch_rows" in message
