"""Further families: one norm for attention and MLP, norms of queries and keys, and one whose pass is no plain sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tailrace.analysis.circuits.attribution import attribute
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import feature_root, logit_root
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.errors import ModelError
from tests.support.circuit_runs import TOKENS, mixed_transcoders
from tests.support.tiny_models import EOS, UNKNOWN, WORDS, save_tiny_tokenizer

TOKENIZER = [UNKNOWN, EOS, *WORDS]
SHAPE = {
    "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def loaded(folder: Path, config: Any) -> LanguageModel:
    """A model of random weights, gains and biases of norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = float(parameter.ndim == 1 and name.endswith("weight"))
                spread = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(centre + spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder, TOKENIZER)
    return load_language_model(ModelSettings(model=str(folder)))


def gptj() -> Any:
    return transformers.GPTJConfig(
        vocab_size=len(TOKENIZER), n_embd=16, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [gptj, lambda: transformers.Qwen2Config(**SHAPE), lambda: transformers.Gemma3TextConfig(head_dim=4, **SHAPE)],
    ids=["gptj", "qwen2", "gemma3"],
)
def test_terms_add_up(tmp_path: Path, config: Any) -> None:
    model = loaded(tmp_path, config())
    run = record_run(model.bridge, read_weights(model), mixed_transcoders(), TOKENS)
    roots = [logit_root(run, 5), feature_root(run, 2, 3)]
    rows = attribute(run, [root.probe for root in roots]).double()
    for root, row in zip(roots, rows, strict=True):
        assert contributions(run, root.probe).incompleteness(root.value) < 1e-5
        assert abs(float(row.sum()) - root.value) < 1e-5 * float(row.abs().sum())


def test_a_family_that_scales_what_it_adds_to_the_stream_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, transformers.GraniteConfig(residual_multiplier=0.3, **SHAPE))
    with pytest.raises(ModelError, match="block 0: what leaves the block is not what entered plus"):
        record_run(model.bridge, read_weights(model), mixed_transcoders(), TOKENS)
