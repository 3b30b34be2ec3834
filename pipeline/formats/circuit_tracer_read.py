"""One layer of a circuit-tracer set: ``layer_N.safetensors``, with the set's ``config.yaml`` beside it if there is one.

Matrices are feature-major. Files of the package's first release (June 2025) hold both the other way round, which
shapes alone give away: the encoder then has more columns than the input is wide.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.formats.foreign import Foreign, check_names, jsonable, log_threshold, read_tensors
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.settings import load_yaml
from tailrace.training.architectures import JumpReLU, ReLU

_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"


def read(path: Path) -> Foreign:
    """Read one file.

    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for a cross-layer transcoder, unknown tensors, the
    first release's orientation, and a configuration that asks for top-k.
    """
    tensors = read_tensors(path)
    check_names(path, tensors, ["W_enc", "b_enc", "W_dec", "b_dec"], [_THRESHOLD, "W_skip"])
    d_sae, d_model = len(tensors["b_enc"]), len(tensors["b_dec"])
    if tuple(tensors["W_enc"].shape) == (d_model, d_sae) != (d_sae, d_model):
        raise ArtifactMismatch(
            f"{path}: W_enc has shape {(d_model, d_sae)}, wanted {(d_sae, d_model)}: it is of circuit-tracer's first "
            "release, whose matrices are the other way round; load and save it with a release from 0.4 on"
        )
    config = _config(path)
    weights = {
        "W_enc": tensors["W_enc"],
        "b_enc": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec_out": tensors["b_dec"],
    }
    skips, jumps = "W_skip" in tensors, _THRESHOLD in tensors
    if jumps:
        weights["log_threshold"] = log_threshold(path, tensors[_THRESHOLD].expand(d_sae).to(torch.float32))
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    match = _LAYER.fullmatch(path.name)
    hooks = {side: _hook(match, config.get(f"feature_{side}_hook")) for side in ("input", "output")}
    return Foreign(
        architecture=JumpReLU(skip=skips) if jumps else ReLU(input_bias=False, skip=skips),
        weights=weights,
        hook_in=hooks["input"],
        hook_out=hooks["output"],
        model_name=config.get("model_name"),
        facts=jsonable(config),
    )


def _config(path: Path) -> dict[str, Any]:
    """Return the configuration of the set the file belongs to; empty if there is none."""
    beside = path.parent / "config.yaml"
    config = load_yaml(beside) if beside.is_file() else {}
    if (kind := config.get("model_kind", "transcoder_set")) != "transcoder_set":
        raise ArtifactMismatch(
            f"{beside}: is a {kind}, wanted a transcoder_set; of a cross_layer_transcoder, give the whole folder: "
            f"{path.parent}"
        )
    if config.get("activation") == "topk":
        raise ArtifactMismatch(
            f"{beside}: says activation: topk, which circuit-tracer ignores for such files and which they do not hold "
            "themselves; what the transcoder computes cannot be told. Import it from the files it was converted from"
        )
    return config


def _hook(layer: re.Match[str] | None, name: str | None) -> str | None:
    return None if layer is None or name is None else f"blocks.{layer[1]}.{name}"
