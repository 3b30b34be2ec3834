"""Gemma Scope's own files: ``params.npz`` of the first one, ``params.safetensors`` and ``config.json`` of the second.

All are JumpReLU, encoders input-major. The first has autoencoders and transcoders in the same layout and says nowhere
what it is of: that is in the name of the repository, which lies on the path where a file was downloaded by its hub.
Its transcoders read the MLP's norm before the gain and write what is added to the stream. The second names modules of
the Hugging Face model; a norm's output is behind its gain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    read_tensors,
    refuse,
)
from tailrace.pipeline.formats.hooks import MLP_IN, MLP_OUT, NORMALISED_IN, RESID_POST, STREAM_OUT
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.training.architectures import JumpReLU

CONFIG = "config.json"
_SKIP = "affine_skip_connection"
_SHAPES: Shapes = {
    "w_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "w_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "threshold": ("d_sae",),
}
"""W_enc and W_dec in the first one."""
_KEYS: Keys = {
    "architecture": Key("what becomes of pre-activations", "jump_relu", ("jump_relu",)),
    "affine_connection": Key("whether a path goes past the features", False),
    "hf_hook_point_in": Key("where it belongs"),
    "hf_hook_point_out": Key("where it belongs"),
    "model_name": Key("where it belongs", kind=str),
    "type": Key("what it is of", None, (None, "sae", "transcoder")),
    **keys_of("shapes, which the weights have themselves", "width"),
    **keys_of("how many features fired on a row", "l0"),
}
"""Of config.json, which the second one has."""
_REPOSITORY = re.compile(r".*(gemma-scope-[^/]*)-(transcoders|res|mlp|att)")
_LAYER = re.compile(r"layer_(\d+)(?:_.*)?")
_HOOKS = {
    "transcoders": (NORMALISED_IN, STREAM_OUT),
    "res": (RESID_POST, RESID_POST),
    "mlp": (STREAM_OUT, STREAM_OUT),
    "att": ("attn.hook_z", "attn.hook_z"),
}
"""What a repository of the first one holds → hooks of a block."""
_MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*)")
_MODULES = {
    "output": RESID_POST,
    "pre_feedforward_layernorm.output": MLP_IN,
    "mlp.input": MLP_IN,
    "mlp.output": MLP_OUT,
    "post_feedforward_layernorm.output": STREAM_OUT,
    "self_attn.o_proj.input": "attn.hook_z",
}
"""What the second one calls a place in a layer → a hook of a block."""


def read(path: Path) -> Foreign:
    """Read one file. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    is_first = path.suffix == ".npz"
    said = {} if is_first else read_keys(path.parent / CONFIG, _config_beside(path), _KEYS)
    tensors = {
        name.replace("W_", "w_"): tensor
        for name, tensor in (_read_arrays(path) if is_first else read_tensors(path)).items()
    }
    skips = _SKIP in tensors
    tensors = check_tensors(path, tensors, _SHAPES, {_SKIP: ("d_in", "d_out")})
    if said and bool(said["affine_connection"]) != skips:
        refuse(path.parent / CONFIG, [f"affine_connection is {said['affine_connection']}, unlike the tensors"])
    weights = {
        "W_enc": tensors["w_enc"].T.contiguous(),
        "b_enc": tensors["b_enc"],
        "W_dec": tensors["w_dec"],
        "b_dec_out": tensors["b_dec"],
        "log_threshold": log_threshold_of_relu(tensors["threshold"]),
    }
    if skips:
        weights["W_skip"] = tensors[_SKIP].T.contiguous()
    hook_in, hook_out = _hooks_by_path(path) if is_first else _hooks_by_module(said)
    return Foreign(
        architecture=JumpReLU(skip=skips),
        weights=weights,
        hook_in=hook_in,
        hook_out=hook_out,
        model_name=said.get("model_name"),
        facts=jsonable(said),
    )


def _config_beside(path: Path) -> Mapping[str, Any]:
    return read_config(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npz file in float32. Raises ArtifactMissing or ArtifactCorrupt."""
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    except Exception as error:  # NumPy raises whatever the bytes lead it to
        raise ArtifactCorrupt(f"{path}: cannot be read as arrays of NumPy ({error}); get the file again") from error


def _hooks_by_path(path: Path) -> tuple[str | None, str | None]:
    parts = path.absolute().parts
    layers = [match[1] for part in parts if (match := _LAYER.fullmatch(part)) is not None]
    kinds = [match[2] for part in parts if (match := _REPOSITORY.fullmatch(part)) is not None]
    if not layers or not kinds:
        return None, None
    hook_in, hook_out = _HOOKS[kinds[-1]]
    return f"blocks.{layers[-1]}.{hook_in}", f"blocks.{layers[-1]}.{hook_out}"


def _hooks_by_module(said: Mapping[str, Any]) -> tuple[str | None, str | None]:
    hook_in = _hook(said["hf_hook_point_in"])
    return hook_in, hook_in if said["hf_hook_point_out"] is None else _hook(said["hf_hook_point_out"])


def _hook(module: str | None) -> str | None:
    match = _MODULE.fullmatch(str(module))
    return None if match is None or match[2] not in _MODULES else f"blocks.{match[1]}.{_MODULES[match[2]]}"
