"""Batches straight from a tiny language model: every row once, pairs together, continued bit for bit."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.live.batches import Opening
from tailrace.pipeline.live.mixing import Mixing
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.text import packing
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.statistics import SiteStatistics
from tests.support.cache_jobs import run_cache
from tests.support.live_runs import BATCH_ROWS, assert_equal, copied, open_live, take


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packer hand out one document's contexts at a time, so that batches of contexts cut through pieces."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """A cache of the same text, model and held-out documents: what live rows are compared with."""
    path = tmp_path_factory.mktemp("live") / "cache"
    run_cache(path, tokens="all", holdout="3", layers="0,1")
    return open_cache(path)


def cached_rows(cache: ActivationCache, key: str, split: str = "train") -> np.ndarray:
    """Return the rows of a cache in the order of the text."""
    opened = cache.split(split)
    return np.concatenate([opened.read_unit(unit, [key])[key] for unit in range(len(opened.unit_rows))])


def in_text_order(mixing: Mixing, served: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the first ``n_rows`` rows of the text from rows in the order in which they were served, each once."""
    order = np.concatenate([mixing.served(stage) for stage in range(n_rows // mixing.block_rows + 1)])
    assert sorted(order[order < n_rows].tolist()) == list(range(n_rows))
    rows = np.full((order.max() + 1, served.shape[1]), np.nan, np.float32)
    rows[order] = served[: len(order)]
    return rows[:n_rows]


def test_one_pass_serves_exactly_the_rows_of_a_cache_of_the_same_text(cache: ActivationCache) -> None:
    n_rows = cache.split("train").n_rows
    with open_live(layers="0,1") as live:
        assert n_rows == 5 * live.block_rows
        n_batches = 3 + 5 * 6  # half a stage, then five stages of which the last also holds rows of the next pass
        served = take(live, n_batches)
        for site in ("layer0", "layer1"):
            for side, name in enumerate(("in", "out")):
                rows = np.concatenate([batch[site][side] for batch in served])
                found = in_text_order(Mixing(0, live.block_rows), rows, n_rows)
                assert np.array_equal(found, cached_rows(cache, f"{site}/{name}")), f"{site}/{name}"


def test_held_out_rows_are_those_of_a_cache_of_the_same_text(cache: ActivationCache) -> None:
    with open_live() as live:
        held = [copied(batch)["layer0"] for batch in live.heldout()]
    expected = np.concatenate([cached_rows(cache, f"layer0/{side}", "heldout") for side in ("in", "out")], axis=1)
    found = np.concatenate([np.concatenate(sides, axis=1) for sides in held])
    assert len(found) == 315
    assert np.array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_the_second_pass_serves_the_rows_of_the_first_in_another_order() -> None:
    with open_live() as live:
        served = np.concatenate([batch["layer0"][0] for batch in take(live, 3 + 10 * 6)])
        assert live.n_passes == 2
        mixing = Mixing(0, live.block_rows)
        rows = in_text_order(mixing, served, 10 * live.block_rows)
    assert np.array_equal(rows[: 5 * 192], rows[5 * 192 :])
    assert not np.array_equal(mixing.served(1) + 5 * 192, mixing.served(6))


def test_outputs_are_the_mlp_of_the_inputs_beside_them() -> None:
    with open_live() as live:
        for batch in take(live, 12):
            inputs, outputs = (torch.from_numpy(side) for side in batch["layer0"])
            with live.borrowed_model() as model:
                (hook,) = model.resolve_sites("0")
                assert model.compare_pair(hook, inputs, outputs).relative_error < 1e-5
                assert model.compare_pair(hook, inputs, outputs.roll(1, 0)).relative_error > 0.1


def test_a_run_continued_at_any_step_serves_the_same_bits() -> None:
    n_steps = 3 + 6 * 6 + 2  # into the second pass
    states = []
    with open_live() as live:
        expected = []
        for _ in range(n_steps):
            states.append(json.dumps(live.state_dict()))
            expected += take(live, 1)
        opening = Opening.from_json(json.loads(json.dumps(live.opening.as_json())))
    with open_live(opening=opening) as live:
        for step, state in enumerate(states):
            live.load_state_dict(json.loads(state))
            assert json.loads(json.dumps(live.state_dict())) == json.loads(state)
            n = n_steps - step if step in (0, 7, 33) else 1  # to the end from some, one batch from each
            assert_equal(take(live, n), expected[step : step + n], f"from step {step}")


def test_a_run_may_be_continued_again_after_every_batch() -> None:
    with open_live() as live:
        state, found = json.dumps(live.state_dict()), []
        expected = take(live, 20)
        for _ in range(20):
            live.load_state_dict(json.loads(state))
            found += take(live, 1)
            state = json.dumps(live.state_dict())
    assert_equal(found, expected, "continued after every batch")


def test_a_state_is_small_json_however_far_the_run_is() -> None:
    with open_live() as live:
        sizes = []
        for _ in range(40):
            sizes.append(len(json.dumps(live.state_dict())))
            live.next_batch()
    assert max(sizes) < 3000
    assert max(sizes) - min(sizes) < 1000


def test_a_position_or_an_opening_of_another_run_is_refused_with_both_values() -> None:
    with open_live() as live:
        state, opening = live.state_dict(), live.opening
    with open_live(seed=1) as other, pytest.raises(ArtifactMismatch, match="seed: there it is 0, asked for 1"):
        other.load_state_dict(state)
    with pytest.raises(ArtifactMismatch, match="context_length: there it is 16, asked for 12"):
        open_live(context_length=12, opening=opening)
    with pytest.raises(ArtifactMismatch, match=r"sites\.layer1: there it is None"):
        open_live(layers="0,1", opening=opening)


def test_statistics_are_of_the_first_block_and_the_same_when_computed_again(cache: ActivationCache) -> None:
    expected = SiteStatistics(16)
    expected.add(cached_rows(cache, "layer0/out")[:192])
    with open_live() as live:
        found = live.statistics["layer0"]["out"]
        assert found.n_rows == live.block_rows == 192
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-5)
        first = live.opening.as_json()
    with open_live() as live:
        assert live.opening.as_json() == first
    with open_live(opening=Opening.from_json(first)) as live:
        assert live.opening.as_json() == first


def count_captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of contexts of every pass of the language model."""
    original, calls = LanguageModel.capture, []

    def counted(self: LanguageModel, tokens: torch.Tensor, sites: Any) -> dict[str, torch.Tensor]:
        calls.append(len(tokens))
        return original(self, tokens, sites)

    monkeypatch.setattr(LanguageModel, "capture", counted)
    return calls


def until_quiet(calls: list[int]) -> int:
    """Wait until nothing was computed for a while; return the number of passes of the model."""
    while True:
        n = len(calls)
        time.sleep(0.3)
        if len(calls) == n:
            return n


def test_an_opening_saves_computing_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_live() as live:
        opening = live.opening
    calls = count_captures(monkeypatch)
    with open_live(opening=opening):
        # 315 held-out rows are 21 contexts of 15 rows, the last batch of 4 being padded
        assert until_quiet(calls) == len(["pairs", "widths"]) + 6
    assert calls == [4, 1] + [4] * 6


def test_the_model_runs_no_more_than_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_captures(monkeypatch)
    with open_live(holdout="0") as live:
        before = 1 + 1  # widths, the check of pairs
        assert until_quiet(calls) - before == -(-2 * live.block_rows // 60), "blocks 0 and 1"
        take(live, 3)
        assert until_quiet(calls) - before == -(-2 * live.block_rows // 60), "stage 0 may still be read"
        take(live, 1)
        assert until_quiet(calls) - before == -(-3 * live.block_rows // 60), "block 2"


def test_the_buffer_keeps_to_its_memory_and_says_how_much_it_takes() -> None:
    row_bytes = 16 * 4 * 2
    with open_live(buffer_rows=100_000, buffer_bytes=3 * 300 * row_bytes) as live:
        assert live.block_rows == 256
        assert live.buffer_bytes == 3 * 256 * row_bytes


@pytest.mark.parametrize(
    ("storage", "expected"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("auto", "float16")]
)
def test_rows_are_kept_as_a_cache_would_store_them(cache: ActivationCache, storage: str, expected: str) -> None:
    with open_live(storage_dtype=storage) as live:
        assert live.sites["layer0"].dtype == expected
        batch = live.next_batch()["layer0"]
        assert batch.inputs.dtype == torch.float32
        exact = torch.from_numpy(cached_rows(cache, "layer0/in")[Mixing(0, live.block_rows).served(0)[:BATCH_ROWS]])
        assert torch.equal(batch.inputs, exact.to(getattr(torch, expected)).float())


def test_an_autoencoder_site_is_kept_once_and_served_on_both_sides() -> None:
    hook = "blocks.0.mlp.hook_out"
    with open_live(layers=None, hooks=(hook,)) as live:
        assert live.buffer_bytes == 3 * live.block_rows * 16 * 4
        batch = live.next_batch()[hook]
        assert torch.equal(batch.inputs, batch.outputs)
        assert list(live.statistics[hook]) == ["in"]


def test_closing_stops_the_background_thread() -> None:
    with open_live() as live:
        live.next_batch()
        assert "live-blocks" in [thread.name for thread in threading.enumerate()]
    assert "live-blocks" not in [thread.name for thread in threading.enumerate()]
    live.close()


def test_the_model_can_be_borrowed_while_the_stream_runs() -> None:
    with open_live() as plain:
        expected = take(plain, 30)
    with open_live() as live:
        found = []
        for _ in range(30):
            with live.borrowed_model() as model:
                model.capture(torch.ones((2, 9), dtype=torch.int64), model.resolve_sites("all"))
            found.append(copied(live.next_batch()))
    assert_equal(found, expected, "with the model borrowed between batches")
