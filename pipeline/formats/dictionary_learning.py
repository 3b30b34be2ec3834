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
    check_names,
    jsonable,
    log_threshold,
    read_config,
    without_input_bias,
)
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, ReLU, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = ["encoder.weight", "encoder.bias", "decoder.weight"]
_WANTED = {
    "AutoEncoder": [*_LINEAR, "bias"],
    "AutoEncoderTopK": [*_LINEAR, "b_dec"],
    "BatchTopKSAE": [*_LINEAR, "b_dec"],
    "JumpReluAutoEncoder": ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"],
}
"""Tensors of each class, besides the single numbers that some keep."""
_NUMBERS = ("k", "threshold")
_RESIDUAL = re.compile(r"resid_post_layer_(\d+)")


def read(folder: Path) -> Foreign:
    """Read a folder. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    trainer = read_config(folder / CONFIG).get("trainer") or {}
    kind = str(trainer.get("dict_class"))
    if kind not in _WANTED:
        raise ArtifactMismatch(f"{folder / CONFIG}: dict_class {kind!r} cannot be imported, only {', '.join(_WANTED)}")
    loaded = load_checkpoint(folder / WEIGHTS)
    tensors = {str(name): value.float() for name, value in loaded.items() if isinstance(value, Tensor)}
    numbers = {name: float(tensors.pop(name)) for name in _NUMBERS if name in tensors and tensors[name].numel() == 1}
    check_names(folder / WEIGHTS, tensors, _WANTED[kind])
    match = _RESIDUAL.fullmatch(str(trainer.get("submodule_name")))
    hook = None if match is None else f"blocks.{match[1]}.hook_resid_post"
    return Foreign(
        architecture=_architecture(folder, kind, {"k": trainer.get("k"), **numbers}),
        weights=_weights(folder, kind, tensors, numbers),
        hook_in=hook,
        hook_out=hook,
        model_name=trainer.get("lm_name"),
        facts=jsonable(trainer),
    )


def _architecture(folder: Path, kind: str, numbers: Mapping[str, Any]) -> Architecture:
    if kind == "JumpReluAutoEncoder":
        return JumpReLU()
    if kind == "AutoEncoder":
        return ReLU(input_bias=False)
    if numbers["k"] is None:
        raise ArtifactMismatch(f"{folder}: neither {CONFIG} nor {WEIGHTS} says k; get the folder again")
    return TopK(k=int(numbers["k"])) if kind == "AutoEncoderTopK" else BatchTopK(k=int(numbers["k"]))


def _weights(folder: Path, kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> dict[str, Tensor]:
    if kind == "JumpReluAutoEncoder":
        return {
            "W_enc": tensors["W_enc"].T.contiguous(),
            "b_enc": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec_out": tensors["b_dec"],
            "log_threshold": log_threshold(folder, tensors["threshold"]),
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
