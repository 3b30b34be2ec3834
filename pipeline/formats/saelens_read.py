"""SAELens' folders: transcoders of all its kinds, and the autoencoders that fire by ReLU, by a threshold or by TopK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tailrace.pipeline.formats.foreign import (
    Foreign,
    check_names,
    jsonable,
    log_threshold,
    read_config,
    read_tensors,
    without_input_bias,
)
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Architecture

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
AUTOENCODERS = ("standard", "jumprelu", "topk")


def read(folder: Path) -> Foreign:
    """Read a folder of release 6 or later.

    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch with everything in it that has no counterpart here.
    """
    config = read_config(folder / CONFIG)
    kind = str(config.get("architecture"))
    metadata = config.get("metadata") or {}
    if problems := _problems(kind, config, metadata):
        raise ArtifactMismatch(f"{folder / CONFIG}: cannot be imported: {'; '.join(problems)}")
    jumps, skips = "jumprelu" in kind, "skip" in kind
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if jumps else []), *(["W_skip"] if skips else [])]
    tensors = read_tensors(folder / WEIGHTS)
    check_names(folder / WEIGHTS, tensors, wanted)
    W_enc, b_enc, W_dec = tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"]
    # Its default for autoencoders is to subtract the output bias from the input; transcoders never do.
    if config.get("apply_b_dec_to_input", True) and kind in AUTOENCODERS:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    if config.get("rescale_acts_by_decoder_norm"):
        # It ranks and shows activations times the decoder norm, and divides again before decoding.
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    weights: dict[str, Tensor] = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec_out": tensors["b_dec"]}
    if jumps:
        weights["log_threshold"] = log_threshold(folder, tensors["threshold"])
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    hook_in = metadata.get("hook_name")
    return Foreign(
        architecture=_architecture(jumps, skips, config),
        weights=weights,
        hook_in=hook_in,
        hook_out=metadata.get("hook_name_out") if kind in TRANSCODERS else hook_in,
        model_name=metadata.get("model_name"),
        facts=jsonable(config),
    )


def _problems(kind: str, config: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    known = (*TRANSCODERS, *AUTOENCODERS)
    problems = [] if kind in known else [f"architecture {kind!r} is none of {', '.join(known)}"]
    for name in ("normalize_activations", "reshape_activations"):
        if (value := config.get(name, "none")) != "none":
            problems.append(f"{name} is {value!r}, which has to be folded into the weights in SAELens first")
    if metadata.get("hook_head_index") is not None:
        problems.append(f"it reads head {metadata['hook_head_index']} only, which a site names as HOOK[HEAD]")
    if kind in TRANSCODERS and config.get("apply_b_dec_to_input", False):
        problems.append("apply_b_dec_to_input is true, which SAELens itself refuses for transcoders")
    return problems


def _architecture(jumps: bool, skips: bool, config: dict[str, Any]) -> Architecture:
    if jumps:
        return JumpReLU(skip=skips)
    if config["architecture"] == "topk":
        return TopK(k=config["k"])
    return ReLU(input_bias=False, skip=skips)
