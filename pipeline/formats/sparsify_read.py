"""One module's folder of sparsify: ``cfg.json`` and ``sae.safetensors``.

Its name is the module's (``layers.3.mlp``). A transcoder reads the module's input and predicts its output; an
autoencoder reads and predicts the output, and takes its output bias off first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tailrace.pipeline.formats.foreign import (
    Foreign,
    check_names,
    jsonable,
    read_config,
    read_tensors,
    without_input_bias,
)
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import TopK

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_MLP = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp")


def read(folder: Path) -> Foreign:
    """Read a folder. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    config = read_config(folder / CONFIG)
    if problems := _problems(config):
        raise ArtifactMismatch(f"{folder / CONFIG}: cannot be imported: {'; '.join(problems)}")
    tensors = read_tensors(folder / WEIGHTS)
    skips = bool(config.get("skip_connection", False))
    wanted = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skips else [])]
    check_names(folder / WEIGHTS, tensors, wanted)
    W_enc, b_enc = tensors["encoder.weight"], tensors["encoder.bias"]
    transcodes = bool(config.get("transcode", False))
    if not transcodes:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec_out": tensors["b_dec"]}
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    match = _MLP.fullmatch(folder.resolve().name)
    block = None if match is None else f"blocks.{match[1]}.mlp"
    return Foreign(
        architecture=TopK(k=config["k"], skip=skips),
        weights=weights,
        hook_in=None if block is None else f"{block}.{'hook_in' if transcodes else 'hook_out'}",
        hook_out=None if block is None else f"{block}.hook_out",
        facts=jsonable(config),
    )


def _problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if (activation := config.get("activation", "topk")) != "topk":
        problems.append(f"activation is {activation!r}, wanted topk")
    if not isinstance(config.get("k"), int) or config["k"] < 1:
        problems.append(f"k is {config.get('k')!r}, wanted a number of features")
    return problems
