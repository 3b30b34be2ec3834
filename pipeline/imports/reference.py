"""Checkpoints of the code that transcoders first came from: ``.pt`` files that hold a pickled configuration object.

Unpickling runs whatever the file says, so it is never done. torch's restricted reader builds tensors and plain values
only; the configuration's class is given to it as an empty bag, whatever it was called, and any other name in the file
is refused before a byte of it is used.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.imports.foreign import Foreign, check_names, jsonable, without_input_bias
from storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing
from training.architectures import ReLU

_CONFIGURATION = re.compile(r"(?:.*\.)?(?:sae_training|sae_lens)(?:\.[A-Za-z_0-9]+)*\.[A-Za-z_0-9]*Config")
_WANTED = ["W_enc", "b_enc", "W_dec", "b_dec"]
_NUMBER_TYPES = (np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType)
_NUMBERS: dict[str, Any] = {
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,
}
"""What a NumPy number among the settings needs (l1 is one in some files); each only builds a number."""


class Bag:
    """Stands for the configuration's class: holds what the file says and does nothing."""


def read(path: Path) -> Foreign:
    """Read a transcoder's or an autoencoder's checkpoint.

    ``f = relu((x − b_dec) W_enc + b_enc)``, ``y = f W_dec + b_dec_out``, where an autoencoder has one bias for both.
    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for a pickle and for names that no such file needs.
    """
    content = _load(path)
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


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    if not zipfile.is_zipfile(path):
        raise ArtifactMismatch(
            f"{path}: is no checkpoint that torch.save wrote; a bare pickle (.pkl, .pkl.gz) could run anything when it "
            "is opened and is not read. Take the .pt file of the same transcoder"
        )
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        bags: list[Any] = [(Bag, name) for name in names if _CONFIGURATION.fullmatch(name)]
        numbers: list[Any] = [(_NUMBERS[name], name) for name in names if name in _NUMBERS]
        if strange := sorted(name for name in names if not _CONFIGURATION.fullmatch(name) and name not in _NUMBERS):
            raise ArtifactMismatch(
                f"{path}: asks for {', '.join(strange)} to be loaded, which no such checkpoint needs and which could "
                "run anything; it is not opened"
            )
        with torch.serialization.safe_globals([*bags, *numbers, *(_NUMBER_TYPES if numbers else ())]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, ValueError, EOFError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as a checkpoint ({error}); get the file again") from error
    return content if isinstance(content, dict) else {}


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    if odd := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ArtifactMismatch(f"{path}: {', '.join(odd)} in state_dict are no tensors; check --from")
    return {str(name): value.detach().to(torch.float32) for name, value in state.items()}
