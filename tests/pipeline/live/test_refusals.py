"""What live mode holds out, and what it refuses, with the words a user needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.cache.rows import PendingRows
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.storage.errors import ActivationOverflow, ModelError, NonFiniteActivation, SettingsError, TextError
from tests.support.live_runs import open_live, take
from tests.support.tiny_models import WORDS, save_tiny_model

N_DOCUMENTS = 24
DOCUMENT_WORDS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows WORDS: token ids 0 ``<unk>``, 1 ``<eos>``, then the words in order."""
    return save_tiny_model(tmp_path_factory.mktemp("live") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one word each, so that a token says which document it comes from: 24 of 40 words."""
    path = tmp_path_factory.mktemp("live") / "text.jsonl"
    rows = [json.dumps({"text": " ".join([word] * DOCUMENT_WORDS)}) for word in WORDS[:N_DOCUMENTS]]
    path.write_text("\n".join(rows) + "\n")
    return path


def embedded_documents(model_folder: Path, rows: np.ndarray) -> set[int]:
    """Return the documents that rows of the embedding hook come from; -1 for a separator."""
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(model_folder).transformer.wte.weight.detach().numpy()
    tokens = [int(np.abs(weights - row).sum(axis=1).argmin()) for row in rows]
    assert np.array_equal(weights[tokens], rows)
    return {token - 2 if token >= 2 else -1 for token in tokens}


@pytest.mark.parametrize(("holdout", "heldout_rows"), [("0.1", 60), ("0.2", 1000), ("5,17", 1000), ("3::8", 100)])
def test_held_out_documents_are_never_trained_on(model, text, holdout, heldout_rows) -> None:
    changes: dict[str, Any] = {
        "layers": None,
        "hooks": ("hook_embed",),
        "holdout": holdout,
        "heldout_rows": heldout_rows,
    }
    changes |= {"model": str(model), "dataset": str(text), "shuffle_window": 16, "buffer_rows": 256}
    with open_live(batch_rows=64, **changes) as live:
        held = np.concatenate([batch["hook_embed"].inputs.numpy() for batch in live.heldout()])
        assert len(held) == live.n_heldout_rows <= heldout_rows
        # three passes over at most 24 · 41 rows
        trained = np.concatenate([batch["hook_embed"][0] for batch in take(live, 3 * 24 * 41 // 64)])
        assert live.n_passes >= 2
    documents = embedded_documents(model, held) - {-1}
    assert documents
    seen = embedded_documents(model, trained) - {-1}
    assert not documents & seen
    if ":" not in holdout and "," not in holdout:
        assert len(seen) > 12, "most documents are trained on"
    if holdout == "5,17":
        assert documents == {5, 17}


def test_part_of_the_held_out_rows_is_always_the_same_sample_of_all(model, text) -> None:
    with open_live(holdout="3", heldout_rows=300) as live:
        everything = np.concatenate([batch["layer0"].inputs.numpy() for batch in live.heldout(None)])
        part = np.concatenate([batch["layer0"].inputs.numpy() for batch in live.heldout(50)])
        again = [len(batch["layer0"].inputs) for batch in live.heldout(50)]
        live.next_batch()
        later = np.concatenate([batch["layer0"].inputs.numpy() for batch in live.heldout(None)])
    assert len(everything) == 300
    assert again == [32, 18]
    assert np.array_equal(part, everything[:50])
    assert np.array_equal(later, everything)


def test_without_held_out_documents_there_are_no_held_out_rows() -> None:
    with open_live(holdout="0") as live:
        assert live.n_heldout_rows == 0
        assert list(live.heldout()) == []


def test_a_text_of_less_than_one_block_is_refused() -> None:
    with pytest.raises(TextError, match="gives 960 training rows in one pass, wanted at least 1,024"):
        open_live(buffer_rows=2048)


def test_a_buffer_smaller_than_four_batches_is_refused() -> None:
    with pytest.raises(SettingsError, match="buffer_rows is 384, wanted at least 400"):
        open_live(batch_rows=100)


def test_all_problems_of_the_settings_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        LiveSettings.read(
            {
                "model": "m",
                "dataset": "d",
                "holdout": "half",
                "context_length": 1,
                "buffer_rows": 0,
                "storage_dtype": "int8",
            }
        )
    lines = str(refused.value).splitlines()
    assert lines[0] == "5 problems in settings:"
    assert [line.strip().split(":")[0] for line in lines[1:]] == [
        "hooks", "context_length", "holdout", "storage_dtype", "buffer_rows",
    ]  # fmt: skip


def test_a_context_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(ModelError, match="--context-length 65 is more than the model's 64"):
        open_live(context_length=65)


def broken_model(folder: Path, word: str, value: float) -> Path:
    """Save a model whose embedding of one word is ``value`` in every dimension."""
    from transformers import AutoModelForCausalLM

    save_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight[2 + WORDS.index(word)] = value
    model.save_pretrained(folder)
    return folder


def text_with(path: Path, word: str, place: int) -> Path:
    """Write a document of 600 words, ``word`` being number ``place`` and any other one "the"."""
    words = ["the"] * 600
    words[place] = word
    path.write_text(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.mark.parametrize("place", [100, 500])
def test_a_value_that_is_not_finite_is_named_by_hook_context_and_position(tmp_path: Path, place: int) -> None:
    # contexts hold 15 words after BOS: word 100 is at position 11 of context 6, word 500 at position 6 of context 33
    context, position = place // 15, place % 15 + 1
    settings: dict[str, Any] = {
        "model": str(broken_model(tmp_path / "model", "even", float("nan"))),
        "dataset": str(text_with(tmp_path / "text.jsonl", "even", place)),
        "layers": None,
        "hooks": ("hook_embed",),  # before attention, which spreads it over the context
        "holdout": "0",
        "buffer_rows": 256,
    }
    expected = rf"hook_embed, context {context}, position {position} \(document 0, token id \d+\): NaN or infinity"
    with pytest.raises(NonFiniteActivation, match=expected), open_live(**settings) as live:
        take(live, 40)


def test_a_failure_of_the_background_thread_is_raised_by_every_later_call(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(broken_model(tmp_path / "model", "even", float("nan"))),
        "dataset": str(text_with(tmp_path / "text.jsonl", "even", 590)),
        "holdout": "0",
        "buffer_rows": 256,
    }
    with open_live(**settings) as live:
        for _ in range(2):
            with pytest.raises(NonFiniteActivation, match="context 39"):
                take(live, 40)


def test_a_row_beyond_float16_is_refused_with_its_place_and_the_way_out() -> None:
    where = {name: np.array([4, 5], np.int64) for name in ("context", "position", "document", "token_id")}
    values = torch.tensor([[1.0, 65504.0], [2.0, -7e4]])

    def stored(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return PendingRows(where, {"a": rows}, {"a": dtype}, {"a": "hook"}).finished().activations["a"]

    assert stored(values[:1], torch.float16).tolist() == [[1.0, 65504.0]]
    with pytest.raises(
        ActivationOverflow, match=r"hook, context 5, position 5 \(document 5, token id 5\): 70000 is beyond float16"
    ):
        stored(values, torch.float16)
    assert stored(values, torch.bfloat16)[1, 1] == torch.tensor(-7e4).bfloat16()
    with pytest.raises(NonFiniteActivation, match="context 4"):
        stored(torch.tensor([[float("inf"), 0.0]]), torch.float32)
