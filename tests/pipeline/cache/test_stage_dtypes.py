"""The storage dtype that ``auto`` chooses, and values that cannot be stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.model.language_model import LanguageModel, SiteHooks
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ActivationOverflow, NonFiniteActivation, OutOfMemoryError
from tests.support.cache_jobs import differing, model_folder, run_cache, scaled_model, tree

BAD_CONTEXT, BAD_POSITION = 21, 3
BAD_UNIT = 4  # row 21 · 15 + 2 = 317 lies in rows 256 to 319


def stored_dtypes(cache: ActivationCache) -> dict[str, str]:
    return {name: site.dtype for name, site in cache.sites.items()}


def test_auto_stores_a_float32_model_in_float16_where_activations_are_small(tmp_path: Path) -> None:
    cache = run_cache(tmp_path / "cache", storage_dtype="auto", layers="all").cache
    assert stored_dtypes(cache) == {"layer0": "float16", "layer1": "float16"}


def test_auto_stores_a_site_with_large_activations_in_bfloat16(tmp_path: Path) -> None:
    largest = run_cache(tmp_path / "plain").cache.split("train").statistics("layer0", "out")
    model = scaled_model(tmp_path / "model", 20_000 / max(largest.maximum, -largest.minimum))
    cache = run_cache(tmp_path / "cache", storage_dtype="auto", layers="all", model=str(model)).cache
    assert stored_dtypes(cache) == {"layer0": "bfloat16", "layer1": "float16"}
    statistics = cache.split("train").statistics("layer0", "out")
    assert max(statistics.maximum, -statistics.minimum) == pytest.approx(20_000, rel=2**-8)


def test_auto_stores_a_bfloat16_model_as_it_computes(tmp_path: Path) -> None:
    model = model_folder(dtype=torch.bfloat16)
    cache = run_cache(tmp_path / "cache", storage_dtype="auto", model=str(model)).cache
    assert stored_dtypes(cache) == {"layer0": "bfloat16"}
    assert cache.manifest.model["dtype"] == "bfloat16"


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that makes the model say one number at one token of one context."""
    tokens = run_cache(tmp_path / "healthy").cache.split("train").context_tokens(np.array([BAD_CONTEXT]))[0]
    capture = LanguageModel.capture

    def with_value(value: float) -> None:
        def spoilt(self: LanguageModel, batch: torch.Tensor, sites: Sequence[SiteHooks]) -> dict[str, torch.Tensor]:
            captured = capture(self, batch, sites)
            if batch.shape[1] != len(tokens):  # finding out widths
                return captured
            for index in torch.nonzero((batch == torch.from_numpy(tokens)).all(1)).flatten().tolist():
                name = "blocks.0.mlp.hook_out"
                captured[name] = captured[name].clone()
                captured[name][index, BAD_POSITION, 7] = value
            return captured

        monkeypatch.setattr(LanguageModel, "capture", spoilt)

    return with_value


def finished_units(path: Path) -> list[int]:
    return sorted(int(record.stem[-6:]) for record in path.glob("commits/0/train-unit-*.json"))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (70_000.0, ActivationOverflow, "is beyond float16 (65504)"),
        (float("nan"), NonFiniteActivation, "NaN or infinity; the model overflows in float32"),
        (float("inf"), NonFiniteActivation, "NaN or infinity; the model overflows in float32"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named_and_finished_units_are_kept(
    tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch, value: float, error: type[Exception], message: str
) -> None:
    run_cache(tmp_path / "expected", storage_dtype="auto")
    with monkeypatch.context():
        spoil(value)
        with pytest.raises(error) as refused:
            run_cache(tmp_path / "cache", storage_dtype="auto")  # the probe sees the first batch only
        assert message in str(refused.value)
        assert f"mlp.hook_out, context {BAD_CONTEXT}, position {BAD_POSITION} (document " in str(refused.value)
        assert "Finished units are kept" in str(refused.value)
        assert finished_units(tmp_path / "cache") == list(range(BAD_UNIT))
        monkeypatch.undo()
    run_cache(tmp_path / "cache", storage_dtype="auto")
    assert differing(tree(tmp_path / "cache"), tree(tmp_path / "expected")) == []


def test_a_value_beyond_float16_fits_into_bfloat16(tmp_path: Path, spoil: Any) -> None:
    spoil(70_000.0)
    split = run_cache(tmp_path / "cache", storage_dtype="bfloat16").cache.split("train")
    assert split.statistics("layer0", "out").maximum == pytest.approx(70_000, rel=2**-8)


@pytest.mark.parametrize("storage_dtype", ["auto", "float32", "int8"])
def test_a_model_that_says_nan_everywhere_is_refused_at_once(tmp_path: Path, storage_dtype: str) -> None:
    # a unit per batch: every one of them fails, also those that were handed over before the first failure was seen
    model = scaled_model(tmp_path / "model", float("nan"))
    with pytest.raises(NonFiniteActivation, match=r"hook_out|layer0/out") as refused:
        run_cache(tmp_path / "cache", model=str(model), storage_dtype=storage_dtype, shard_rows=4, chunk_rows=4)
    assert "--model-dtype float32" in str(refused.value)
    assert "leave this site out" in str(refused.value)
    assert finished_units(tmp_path / "cache") == []


@pytest.mark.parametrize("exclude", ["bos", "none"])
def test_int8_is_cached_end_to_end(tmp_path: Path, exclude: str) -> None:
    cache = run_cache(tmp_path / "cache", storage_dtype="int8", exclude=exclude).cache
    split = cache.split("train")
    assert split.dtype("layer0/in") == "float32"
    assert (cache.path / "train/sites/layer0/in/q/c/0/0").exists()
    with split.stream(["layer0/in", "layer0/out"], batch_rows=50, n_epochs=1) as stream:
        served = np.concatenate([batch.arrays["layer0/out"].copy() for batch in stream])
    assert served.shape == (500, 16)
    assert np.allclose(served.mean(0), split.statistics("layer0", "out").mean, atol=0.02)
    assert verify_bytes(tmp_path / "cache") == []


def test_running_out_of_memory_names_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    forward = TransformerBridge.forward

    def hungry(self: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
        if len(tokens) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(TransformerBridge, "forward", hungry)
    with pytest.raises(OutOfMemoryError, match="batch of 4 contexts; try a batch of 2, with --contexts-per-batch"):
        run_cache(tmp_path / "cache")
    assert run_cache(tmp_path / "another", contexts_per_batch=2).cache.split("train").n_rows == 500
