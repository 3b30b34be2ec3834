"""Checkpoints of the code that transcoders first came from: ``.pt`` files that hold a pickled configuration object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.formats.checkpoint import Bag, load_checkpoint
from tailrace.pipeline.formats.foreign import Foreign, check_names, jsonable, without_input_bias
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import ReLU

_CONFIGURATION = re.compile(r"(?:.*\.)?(?:sae_training|sae_lens)(?:\.[A-Za-z_0-9]+)*\.[A-Za-z_0-9]*Config")
_WANTED = ["W_enc", "b_enc", "W_dec", "b_dec"]


def read(path: Path) -> Foreign:
    """Read a transcoder's or an autoencoder's checkpoint.

    ``f = relu((x − b_dec) W_enc + b_enc)``, ``y = f W_dec + b_dec_out``, where an autoencoder has one bias for both.
    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for a pickle and for names that no such file needs.
    """
    content = load_checkpoint(path, _CONFIGURATION)
    config, state = content.get("cfg"), content.get("state_dict")
    if not isinstance(config, Bag) or not isinstance(state, Mapping):
        raise ArtifactMismatch(
            f"{path}: holds {', '.join(map(str, content)) or 'nothing'}; wanted cfg and state_dict, as a checkpoint of "
            "the original code has them; check --from"
        )
    said = dict(vars(config))
    tensors = _tensors(path, state)
    transcodes = bool(said.get("is_transcoder", "b_dec_out" in tensors))
    check_names(path, tensors, [*_WANTED, *(["b_dec_out"] if transcodes else [])])
    W_enc = tensors["W_enc"].T.contiguous()
    hook_in = said.get("hook_point")
    return Foreign(
        architecture=ReLU(input_bias=False),
        weights={
            "W_enc": W_enc,
            "b_enc": without_input_bias(W_enc, tensors["b_enc"], tensors["b_dec"]),
            "W_dec": tensors["W_dec"],
            "b_dec_out": tensors["b_dec_out" if transcodes else "b_dec"],
        },
        hook_in=hook_in,
        hook_out=said.get("out_hook_point") if transcodes else hook_in,
        model_name=said.get("model_name"),
        facts={key: jsonable(value) for key, value in said.items()},
        processing="compatibility",  # ``HookedTransformer`` did that by default, and the code knew no other way
    )


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ArtifactMismatch(f"{path}: {', '.join(odd)} in state_dict are no tensors; check --from")
    return {str(name): value.detach().to(torch.float32) for name, value in state.items()}
