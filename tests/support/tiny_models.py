"""Random language models of a few thousand weights, saved like real checkpoints; needs no network.

Norm gains and biases are randomised too: with the usual ones and zeros, the value before a norm's gain equals the
value after it, and a test could not tell a wrong hook from the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("gpt2", "neox", "llama", "gemma2", "olmo2")

WORDS = (
    "the", "of", "to", "and", "in", "a", "that", "is", "was", "for", "on", "with", "as", "by", "at", "from", "it",
    "be", "this", "have", "are", "not", "or", "an", "they", "which", "one", "you", "were", "all", "her", "she",
    "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so",
    "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new", "some",
    "could", "these", "two", "may", "first", "then", "do", "any", "like", "my", "now", "over", "such", "our", "man",
    "me", "even",
)  # fmt: skip
"""The words a tiny model knows unless told otherwise."""

EOS = "<eos>"
BOS = "<bos>"
UNKNOWN = "<unk>"


def save_tiny_model(
    path: Path,
    family: str = "gpt2",
    vocabulary: Sequence[str] = WORDS,
    n_layers: int = 2,
    d_model: int = 16,
    context_length: int = 64,
    seed: int = 0,
    *,
    bos_token: str | None = None,
    eos_token: str | None = EOS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a random model of ``family`` and a word-level tokenizer into the folder ``path``; return ``path``.

    Token ids: 0 ``<unk>``, then ``eos_token`` and ``bos_token`` where given, then ``vocabulary`` in order. GPT-2's own
    tokenizer has no separate BOS, hence the default.
    """
    special = list(dict.fromkeys(token for token in (UNKNOWN, eos_token, bos_token) if token is not None))
    tokens = [*special, *vocabulary]
    model = build_tiny_model(family, len(tokens), n_layers, d_model, context_length, seed).to(dtype)
    model.config.bos_token_id = tokens.index(bos_token) if bos_token else None
    model.config.eos_token_id = tokens.index(eos_token) if eos_token else None
    model.generation_config = type(model.generation_config)()
    model.save_pretrained(path)
    save_tiny_tokenizer(path, tokens, bos_token=bos_token, eos_token=eos_token)
    return path


def save_tiny_tokenizer(
    path: Path, tokens: Sequence[str], *, bos_token: str | None = None, eos_token: str | None = EOS
) -> None:
    """Save a word-level tokenizer, split at white space, whose ids are the positions in ``tokens``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word_level: Any = models.WordLevel(vocab={token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(word_level)
    splitter: Any = pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = splitter
    names = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": UNKNOWN}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in names.items() if token is not None}
    ).save_pretrained(path)


def build_tiny_model(
    family: str, n_tokens: int, n_layers: int = 2, d_model: int = 16, context_length: int = 64, seed: int = 0
) -> Any:
    """Return a random Hugging Face causal language model; the caller's global random state is left as it was."""
    import transformers

    shape = {
        "vocab_size": n_tokens,
        "hidden_size": d_model,
        "intermediate_size": 4 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context_length,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config: Any
    match family:
        case "gpt2":
            config = transformers.GPT2Config(
                vocab_size=n_tokens,
                n_embd=d_model,
                n_layer=n_layers,
                n_head=4,
                n_positions=context_length,
                bos_token_id=None,
                eos_token_id=None,
            )
        case "neox":
            config = transformers.GPTNeoXConfig(**shape)
        case "llama":
            config = transformers.LlamaConfig(num_key_value_heads=2, **shape)
        case "gemma2":
            config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=d_model // 4, sliding_window=32, **shape)
        case "olmo2":
            config = transformers.Olmo2Config(num_key_value_heads=2, **shape)
        case _:
            raise ValueError(f"family {family!r} is none of {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    centre = 1.0 if name.endswith("weight") else 0.0
                    parameter.copy_(centre + 0.5 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()
