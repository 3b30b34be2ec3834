"""A small random model of every architecture that TransformerLens lists, saved like a real checkpoint.

Sizes go by the names that configurations share, and what an architecture needs besides is in ``_OWN``. Of those that
are refused by what their configuration says, nothing but the configuration is right.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.tiny_models import BOS, EOS, UNKNOWN, WORDS, save_tiny_tokenizer

TOKENS = (UNKNOWN, EOS, BOS, "<pad>", *WORDS)
CONTEXT_LENGTH = 64
HYBRID = ["linear_attention", "full_attention"]

_SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 3, "image_token_id": 5,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "depth": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": CONTEXT_LENGTH, "n_positions": CONTEXT_LENGTH, "n_ctx": CONTEXT_LENGTH,
    "max_seq_len": CONTEXT_LENGTH, "sliding_window": 32,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1,
    "chunk_size": 8, "patch_size": 8, "image_size": 16,
    "vocab_size_per_layer_input": len(TOKENS), "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""What configurations call their sizes; each takes those that it has."""

_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip


def _text(model_type: str) -> dict[str, Any]:
    """Return the configuration of the text part of a model that also reads images."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {"model_type": model_type, **{name: _SIZES[name] for name in names}}


_OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "DeepseekV4ForCausalLM": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "o_groups": 2, "o_lora_rank": 8,
    },
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 5},
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1], "embed_dim": 8, "codebook_size": 16, "num_res_blocks": 1,
            "z_channels": 8,
        },
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "FalconMambaForCausalLM": {"state_size": 8},
    "Gemma3ForConditionalGeneration": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_CLIP, "model_type": "siglip_vision_model"},
        "boi_token_id": 6, "eoi_token_id": 7, "mm_tokens_per_image": 4,
    },
    "Gemma4ForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, "num_kv_shared_layers": 0
    },
    "GlmMoeDsaForCausalLM": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "Glm4MoeLiteForCausalLM": _LATENT,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "GraniteMoeHybridForCausalLM": {"layer_types": HYBRID},
    "Idefics3ForConditionalGeneration": {"text_config": _text("llama")},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LlavaForConditionalGeneration": {"text_config": _text("llama"), "vision_config": _CLIP},
    "LlavaNextForConditionalGeneration": {"text_config": _text("llama"), "vision_config": _CLIP},
    "LlavaOnevisionForConditionalGeneration": {
        "text_config": _text("qwen2"), "vision_config": {**_CLIP, "model_type": "siglip_vision_model"},
        "video_token_id": 6,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "state_size": 8, "n_groups": 1, "time_step_rank": 4},
    "MambaForCausalLM": {"state_size": 8},
    "Mistral3ForConditionalGeneration": {
        "text_config": _text("mistral"), "vision_config": {**_CLIP, "model_type": "pixtral", "head_dim": 8}
    },
    "NemotronHForCausalLM": {
        "layers_block_type": [*HYBRID, "mlp", "moe"],
        "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
    },
    "Qwen3NextForCausalLM": {"layer_types": HYBRID},
    "Qwen3_5ForCausalLM": {"layer_types": HYBRID},
    "Qwen3_5MoeForCausalLM": {"layer_types": HYBRID},
    "YoutuForCausalLM": _LATENT,
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
}  # fmt: skip

_CALLED_OTHERWISE = {
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "GPT2LMHeadCustomModel": "GPT2LMHeadModel",
}
"""Names in config.json of what transformers calls otherwise."""

_ONLY_CONFIGURED = {"Gemma3nForConditionalGeneration"}
"""Architectures that transformers cannot build from what is installed here."""


class Family(NamedTuple):
    """An architecture with settings of its own."""

    architecture: str
    note: str = ""
    """What is special about the configuration."""
    own: Mapping[str, Any] = {}

    @property
    def label(self) -> str:
        """Architecture and note, to be read."""
        return f"{self.architecture}, {self.note}" if self.note else self.architecture


VARIANTS = (
    Family("BertLMHeadModel", "a decoder", {"is_decoder": True}),
    Family("CohereForCausalLM", "norms of queries and keys", {"use_qk_norm": True}),
    Family("FalconForCausalLM", "Falcon-40b's blocks", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("FalconForCausalLM", "ALiBi", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    Family("GPTNeoXForCausalLM", "one sublayer after the other", {"use_parallel_residual": False}),
    Family("GraniteForCausalLM", "scaled logits and embeddings", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    Family("GraniteForCausalLM", "scaled sublayers", {"residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    Family("MptForCausalLM", "scaled logits", {"logit_scale": 0.5}),
    Family("OPTForCausalLM", "OPT-350m's", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    Family("OPTForCausalLM", "narrow embeddings", {"word_embed_proj_dim": 8}),
)


def architectures() -> list[str]:
    """Return the names of all architectures that the installed TransformerLens lists."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return list(SUPPORTED_ARCHITECTURES)


def families() -> list[Family]:
    """Return every architecture with its plain configuration, and those with others."""
    return sorted([*map(Family, architectures()), *VARIANTS], key=lambda one: one.label.casefold())


def save_family(path: Path, family: Family) -> Path:
    """Save a random model of ``family`` with a word-level tokenizer into the folder ``path``; return ``path``."""
    import transformers

    name = _CALLED_OTHERWISE.get(family.architecture, family.architecture)
    model_class: Any = getattr(transformers, name, None)
    path.mkdir(parents=True)
    save_tiny_tokenizer(path, list(TOKENS), bos_token=BOS)
    if model_class is None:
        _write_config(path, family, {"model_type": name.lower(), "auto_map": {"AutoConfig": "configuration.Config"}})
    elif name in _ONLY_CONFIGURED or _is_refused_by_kind(name, model_class.config_class):
        _write_config(path, family, {"model_type": model_class.config_class.model_type})
    else:
        config = _config(model_class.config_class, {**_OWN.get(name, {}), **family.own})
        _randomised(model_class, config).save_pretrained(path)
        written = json.loads((path / "config.json").read_text())
        _write_config(path, family, written)
    return path


def reference(path: Path, family: Family) -> Any:
    """Return the saved model as transformers loads it: nothing of TransformerLens or of ours."""
    import transformers

    name = _CALLED_OTHERWISE.get(family.architecture, family.architecture)
    model_class: Any = getattr(transformers, "BloomForCausalLM" if name == "BloomModel" else name)
    return model_class.from_pretrained(path, attn_implementation="eager").eval().requires_grad_(False)


def _write_config(path: Path, family: Family, written: Mapping[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps({**written, "architectures": [family.architecture]}))
    (path / "model.safetensors").touch()  # where the model was saved, its weights lie there and stay


def _is_refused_by_kind(name: str, config_class: Any) -> bool:
    from transformer_lens.utilities import architectures as kinds

    others = (
        kinds.SEQ2SEQ_ARCHITECTURES, kinds.MASKED_LM_ARCHITECTURES, kinds.AUDIO_ARCHITECTURES,
        kinds.AUDIO_TEXT_ARCHITECTURES, kinds.VISION_ARCHITECTURES, {"Florence2ForConditionalGeneration"},
    )  # fmt: skip
    return any(name in kind for kind in others) or bool(getattr(config_class, "is_encoder_decoder", False))


@cache
def _setting_names(config_class: Any) -> frozenset[str]:
    return frozenset({*config_class().to_dict(), *(getattr(config_class, "attribute_map", None) or {})})


def _config(config_class: Any, own: Mapping[str, Any]) -> Any:
    """Return a small configuration; those of its parts are made in the same way unless ``own`` has all of one."""
    renamed = getattr(config_class, "attribute_map", None) or {}
    taken = {
        name: value
        for name, value in _SIZES.items()
        if name in _setting_names(config_class) and renamed.get(name) not in _SIZES
    }
    parts = getattr(config_class, "sub_configs", None) or {}
    for name, part in parts.items():
        if inspect.isclass(part) and part.__name__ != "AutoConfig":
            taken[name] = _config(part, own.get(name, {})).to_dict()
    taken |= {name: value for name, value in own.items() if name not in taken or name not in parts}
    return config_class(**taken)


def _randomised(model_class: Any, config: Any) -> Any:
    """Return a model with norms' gains and biases random too; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    centre = 1.0 if name.endswith("weight") else 0.0
                    parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config)()
    return model.eval()
