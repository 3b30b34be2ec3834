"""Checkpoints of the code that transcoders first came from: pickles of a configuration object and of tensors.

They are ``.pt`` files that torch wrote, or bare pickles (``.pkl``, ``.pkl.gz``). Firing rates lie beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.formats.checkpoint import Bag, load_checkpoint
from tailrace.pipeline.formats.foreign import (
    Foreign,
    Key,
    Keys,
    Shapes,
    check_tensors,
    checked_log_sparsity,
    jsonable,
    keys_of,
    read_keys,
    read_tensors,
    without_input_bias,
)
from tailrace.pipeline.formats.saelens import FORMER, KEYS
from tailrace.storage.cache_format import HookName
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch
from tailrace.training.architectures import ReLU

_CONFIGURATION = re.compile(r"(?:.*\.)?(?:sae_training|sae_lens)(?:\.[A-Za-z_0-9]+)*\.[A-Za-z_0-9]*Config")
_SHAPES: Shapes = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_in",)}
_FACTOR = "scaling_factor"
"""A factor per feature for decoding, in checkpoints of the code that became SAELens; mostly ones."""
_SPARSITY = "_log_feature_sparsity.pt"
"""What the name of a file of log10 firing rates has behind its checkpoint's."""
_KEYS: Keys = {
    **KEYS,
    "architecture": Key("which kind it is", "standard", ("standard",)),
    "activation_fn": Key("what becomes of pre-activations", "relu", ("relu",)),
    "apply_b_dec_to_input": Key("whether the input bias is taken off", True, (True,)),
    "is_transcoder": Key("whether it writes to another hook than it reads"),
    "out_hook_point": Key("where it belongs", kind=str),
    **keys_of("where it belongs", "out_hook_point_layer"),
    **keys_of(
        "how it was trained",
        "is_sparse_connection sparse_connection_sae_path sparse_connection_l1_coeff sparse_connection_use_W_enc "
        "total_training_tokens store_batch_size train_batch_size feature_sampling_method resample_batches "
        "feature_reinit_scale dead_feature_estimation_method",
    ),
    **keys_of("the log of the run", "use_tqdm"),
}
"""Of the pickled configuration, in the original code and in what it was made from."""


def read(path: Path) -> Foreign:
    """Read a transcoder's or an autoencoder's checkpoint, or its tensors alone as ``.safetensors``.

    ``f = relu((x − b_dec) W_enc + b_enc)``, ``y = f W_dec + b_dec_out``, where an autoencoder has one bias for both.
    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for names that no such file needs, and for settings
    that change the function.
    """
    config, found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    said = read_keys(path, config, _KEYS, FORMER)
    transcodes = "b_dec_out" in found if said["is_transcoder"] is None else bool(said["is_transcoder"])
    shapes = {**_SHAPES, "b_dec_out": ("d_out",)} if transcodes else {**_SHAPES, "W_dec": ("d_sae", "d_in")}
    tensors = check_tensors(path, found, shapes, {_FACTOR: ("d_sae",)})
    W_enc = tensors["W_enc"].T.contiguous()
    W_dec = tensors["W_dec"] * tensors[_FACTOR][:, None] if _FACTOR in tensors else tensors["W_dec"]
    head = said["hook_head_index"]
    hook_in = said["hook_name"] if head is None else str(HookName(said["hook_name"], head))
    log_sparsity, notes = _log_sparsity(path, len(W_enc))
    return Foreign(
        architecture=ReLU(input_bias=False),
        weights={
            "W_enc": W_enc,
            "b_enc": without_input_bias(W_enc, tensors["b_enc"], tensors["b_dec"]),
            "W_dec": W_dec,
            "b_dec_out": tensors["b_dec_out" if transcodes else "b_dec"],
        },
        hook_in=hook_in,
        hook_out=said["out_hook_point"] if transcodes else hook_in,
        model_name=said["model_name"],
        facts={key: jsonable(value) for key, value in config.items()},
        # ``HookedTransformer`` did that by default, and the code knew no other way; tensors alone say nothing of it.
        processing="compatibility" if config else None,
        notes=notes,
        log_sparsity=log_sparsity,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {}, read_tensors(path)


def _read_pickle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a pickled checkpoint."""
    content = load_checkpoint(path, _CONFIGURATION, bare=True)
    content = content if isinstance(content, dict) else {}
    config, state = content.get("cfg"), content.get("state_dict")
    if not isinstance(config, Bag) or not isinstance(state, Mapping):
        raise ArtifactMismatch(
            f"{path}: holds {', '.join(map(str, content)) or 'nothing'}; wanted cfg and state_dict, as a checkpoint of "
            "the original code has them; check --from"
        )
    return dict(vars(config)), _tensors(path, state)


def sparsity_file(path: Path) -> Path:
    """Return where the original code puts the firing rates of a checkpoint."""
    stem = re.sub(r"\.(pt|pkl|pkl\.gz|safetensors)$", "", path.name)
    return path.with_name(f"{stem}{_SPARSITY}")


def _log_sparsity(path: Path, d_sae: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return log10 of how often each feature fired, (d_sae,), and why it is not read if a file of it is not."""
    beside = sparsity_file(path)
    if not beside.is_file():
        return None, ()
    try:
        values = load_checkpoint(beside, bare=True)
        values = values.get("freqs") if isinstance(values, Mapping) else values
        if not isinstance(values, Tensor):
            raise ArtifactMismatch(f"{beside}: holds {type(values).__name__}, wanted a tensor")
        return checked_log_sparsity(beside, values.detach().to(torch.float32), d_sae), ()
    except (ArtifactMismatch, ArtifactCorrupt) as error:
        return None, (f"firing rates beside it are left out: {error}",)


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ArtifactMismatch(f"{path}: {', '.join(odd)} in state_dict are no tensors; check --from")
    return {str(name): value.detach().to(torch.float32) for name, value in state.items()}
