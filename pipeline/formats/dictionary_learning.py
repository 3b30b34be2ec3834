"""dictionary_learning's folders: ``config.json``, and ``ae.pt`` with the tensors of an autoencoder.

All of its kinds but JumpReLU take the output bias off the input first. BatchTopK fires above its threshold in use, as
ours does; TopK keeps a threshold too, which it does not use unless asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tailrace.pipeline.formats.checkpoint import load_checkpoint
from tailrace.pipeline.formats.foreign import (
    Foreign,
    Key,
    Keys,
    Shapes,
    check_tensors,
    jsonable,
    keys_of,
    log_threshold_of_relu,
    read_config,
    read_keys,
    refuse,
    without_input_bias,
)
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, ReLU, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR: Shapes = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_in", "d_sae"),
}
_TENSORS: dict[str, Shapes] = {
    "AutoEncoder": {**_LINEAR, "bias": ("d_in",)},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": ("d_in",)},
    "BatchTopKSAE": {**_LINEAR, "b_dec": ("d_in",)},
    "JumpReluAutoEncoder": {
        "W_enc": ("d_in", "d_sae"),
        "b_enc": ("d_sae",),
        "W_dec": ("d_sae", "d_in"),
        "b_dec": ("d_in",),
        "threshold": ("d_sae",),
    },
}
"""Tensors of each class, besides the single numbers that some keep."""
_NUMBERS = {"AutoEncoderTopK": ("k", "threshold"), "BatchTopKSAE": ("k", "threshold")}
_KEYS: Keys = {
    "dict_class": Key("which kind it is", None, tuple(_TENSORS)),
    "k": Key("how many features fire on a row", kind=float),
    "submodule_name": Key("where it belongs"),
    "lm_name": Key("where it belongs", kind=str),
    **keys_of("shapes, which the weights have themselves", "activation_dim dict_size"),
    **keys_of("undone before the weights are written", "norm_factor"),
    **keys_of("where it belongs, for the log", "layer wandb_name device"),
    **keys_of(
        "how it was trained",
        "trainer_class lr steps seed warmup_steps decay_start resample_steps l1_penalty sparsity_penalty "
        "sparsity_warmup_steps sparsity_function p_start p_end anneal_start anneal_end sparsity_queue_length "
        "n_sparsity_updates auxk_alpha top_k_aux threshold_beta threshold_start_step bandwidth target_l0",
    ),
}
"""Of a trainer's configuration, up to 0.1.0."""
_FILE_KEYS: Keys = {"trainer": Key("the transcoder", kind=dict), "buffer": Key("what it was trained on", kind=dict)}
_RESIDUAL = re.compile(r"resid_post_layer_(\d+)")


def read(folder: Path) -> Foreign:
    """Read a folder. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    path = folder / CONFIG
    file = read_keys(path, read_config(path), _FILE_KEYS)
    said = read_keys(path, file["trainer"] or {}, _KEYS)
    kind = said["dict_class"]
    if kind is None:
        refuse(path, [f"trainer.dict_class is missing, wanted one of {', '.join(_TENSORS)}"])
    loaded = load_checkpoint(folder / WEIGHTS)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        refuse(folder / WEIGHTS, ["wanted tensors by their names and nothing else"])
    tensors = {str(name): value.float() for name, value in loaded.items()}
    numbers = {
        name: float(tensors.pop(name))
        for name in _NUMBERS.get(kind, ())
        if name in tensors and tensors[name].numel() == 1
    }
    tensors = check_tensors(folder / WEIGHTS, tensors, _TENSORS[kind])
    match = _RESIDUAL.fullmatch(str(said["submodule_name"]))
    # What goes in and comes out of a module is told apart there only; a dictionary of both is a transcoder.
    reads_output = (file["buffer"] or {}).get("io", "out") == "out"
    hook = f"blocks.{match[1]}.hook_resid_post" if match is not None and reads_output else None
    return Foreign(
        architecture=_architecture(folder, kind, {"k": said["k"], **numbers}),
        weights=_weights(kind, tensors, numbers),
        hook_in=hook,
        hook_out=hook,
        model_name=said["lm_name"],
        facts=jsonable(file["trainer"]),
    )


def _architecture(folder: Path, kind: str, numbers: Mapping[str, Any]) -> Architecture:
    if kind == "JumpReluAutoEncoder":
        return JumpReLU()
    if kind == "AutoEncoder":
        return ReLU(input_bias=False)
    if numbers["k"] is None:
        raise ArtifactMismatch(f"{folder}: neither {CONFIG} nor {WEIGHTS} says k; get the folder again")
    return (TopK if kind == "AutoEncoderTopK" else BatchTopK).read({"k": numbers["k"]}, where=str(folder))


def _weights(kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> dict[str, Tensor]:
    if kind == "JumpReluAutoEncoder":
        return {
            "W_enc": tensors["W_enc"].T.contiguous(),
            "b_enc": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec_out": tensors["b_dec"],
            "log_threshold": log_threshold_of_relu(tensors["threshold"]),
        }
    b_dec = tensors["bias" if kind == "AutoEncoder" else "b_dec"]
    W_enc = tensors["encoder.weight"]
    weights = {
        "W_enc": W_enc,
        "b_enc": without_input_bias(W_enc, tensors["encoder.bias"], b_dec),
        "W_dec": tensors["decoder.weight"].T.contiguous(),
        "b_dec_out": b_dec,
    }
    if kind == "BatchTopKSAE":
        # -1 until it has been learnt, when everything above zero fires
        weights["threshold"] = b_dec.new_tensor(max(0.0, numbers.get("threshold", 0.0)))
    return weights
