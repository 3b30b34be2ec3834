"""A penalty on connections to another transcoder: features should write along few of the directions it reads.

For a transcoder of a later layer whose features are already known, this makes the paths into them sparse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailrace.storage.artifact import published_file
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Trace, Transcoder
from tailrace.training.architectures.manifest import WEIGHTS, TranscoderManifest
from tailrace.training.loop.settings import AnyConnection, NoConnection
from tailrace.training.rows.batches import Batch

_NAMES: dict[str, str] = {"encoder": "W_enc", "decoder": "W_dec"}
_BLOCK_NUMBERS = 2**24
"""Products held at a time: 64 MB in float32."""


class ConnectionLoss:
    """``coefficient`` · mean over reference rows i of Σ over features j of |S_i · W_dec_j|.

    S (n, d_out) is the reference's encoder or decoder, as it was published. It is read at the first step, to the device
    of the weights. The gradient, coefficient / n · sign(W_dec Sᵀ) S, is computed with the loss, block by block, since
    all (n, d_sae) products at once would be larger than anything else in a step.
    """

    def __init__(self, path: Path, matrix: str, coefficient: float, *, d_out: int) -> None:
        self._file = _weights_file(path)
        self._name, self._coefficient = _NAMES[matrix], coefficient
        self._reference: Tensor | None = None
        _check_shape(self._file, self._name, d_out)

    def __call__(self, transcoder: Transcoder, batch: Batch, trace: Trace) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the weighted penalty as ``connection``."""
        if self._reference is None:
            with safe_open(self._file, framework="pt") as file:
                self._reference = file.get_tensor(self._name).to(transcoder.W_dec.device, transcoder.W_dec.dtype)
        penalty: Tensor = _MeanAbsoluteProducts.apply(transcoder.W_dec, self._reference)  # type: ignore[no-untyped-call]
        return {"connection": trace.reductions.over_features(penalty) * self._coefficient}


class _MeanAbsoluteProducts(torch.autograd.Function):
    """mean_i Σ_j |S_i · W_j| of W (d_sae, width), and S (n, width), which is constant."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, reference: Tensor) -> Tensor:
        total = weights.new_zeros((), dtype=torch.float64)
        gradient = torch.zeros_like(weights)
        n_rows = max(1, _BLOCK_NUMBERS // len(weights))
        for start in range(0, len(reference), n_rows):
            block = reference[start : start + n_rows]
            products = block @ weights.T
            total += products.abs().sum(dtype=torch.float64)
            gradient.addmm_(products.sign_().T, block, alpha=1 / len(reference))
        ctx.save_for_backward(gradient)
        return (total / len(reference)).to(weights.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


def _weights_file(path: Path) -> Path:
    """Return the file of a published transcoder, or ``path`` if it is a safetensors file."""
    if path.is_dir():
        return published_file(path, TranscoderManifest.read(path), WEIGHTS)
    if path.suffix != ".safetensors":
        kind = "is a file with another ending" if path.exists() else "there is nothing at this path"
        raise SettingsError(
            f"connection_path: {path}: {kind}; give the directory of a published transcoder, or a .safetensors file "
            "with W_enc and W_dec. Pickled checkpoints (.pt, .pkl) are not opened, because they can run code"
        )
    return path


def _check_shape(file: Path, name: str, d_out: int) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            held = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise SettingsError(f"connection_path: {file}: there is no such file; check the path") from error
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"connection_path: {file}: cannot be read as safetensors ({error})") from error
    shape = held.get(name)
    if shape is None:
        raise SettingsError(f"connection_path: {file}: holds no {name}, only {', '.join(sorted(held))}")
    if len(shape) != 2 or shape[1] != d_out:
        raise SettingsError(
            f"connection_path: {file}: {name} has shape {tuple(shape)}, wanted (features, {d_out}), since its rows are "
            "compared with what this transcoder writes; choose a transcoder of the same model, or the other matrix by "
            "connection_matrix"
        )


def build_connection(settings: AnyConnection, d_out: int) -> ConnectionLoss | None:
    """Return the loss for decoder rows of width ``d_out``, None for none.

    Raises SettingsError if the reference does not fit.
    """
    if isinstance(settings, NoConnection):
        return None
    path, matrix = settings.connection_path, settings.connection_matrix
    return ConnectionLoss(path, matrix, settings.connection_coefficient, d_out=d_out)
