"""One optimiser step under the decoder's constraint: parallel gradient off, clipping, update, rows back to unit norm.

``BlockedAdam`` does all of it in one pass over each large matrix; ``TorchOptimiser`` is the plain sequence, for other
devices and optimisers. Both keep their state as named tensors, so that a checkpoint needs no pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.choices import OptimiserKind
from tailrace.training.kernels import loops
from tailrace.training.kernels.loops import over_ranges

if TYPE_CHECKING:
    from tailrace.training.kernels.device.step import DeviceGradients

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimiser(Protocol):
    """Updates a transcoder from its gradients."""

    def step(self, lr: float) -> None:
        """Take one step at learning rate ``lr`` from the gradients in ``.grad``, which may be changed."""
        ...

    def forget(self, features: Tensor) -> None:
        """Zero what is remembered of features (n,), by index: they start anew."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        ...


class TorchOptimiser:
    """Any of torch's optimisers, with projection, clipping and normalisation as passes of their own."""

    def __init__(
        self,
        transcoder: Transcoder,
        optimisers: list[torch.optim.Optimizer],
        *,
        clip: float | None = None,
        gradients: DeviceGradients | None = None,
    ) -> None:
        self._transcoder, self._optimisers, self._clip = transcoder, optimisers, clip
        self._gradients = gradients
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in transcoder.named_parameters()}

    def step(self, lr: float) -> None:
        """Take one step."""
        self._transcoder.constrain_gradients()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._transcoder.parameters(), self._clip)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            if self._gradients is not None and self._gradients.overflow is not None:
                # fused optimisers then leave all as it is, as where a gradient scaler overflows
                optimiser.found_inf = (self._gradients.overflow != 0).float()[0]  # type: ignore[attr-defined]
            optimiser.step()
        self._transcoder.constrain_parameters()

    def forget(self, features: Tensor) -> None:
        """Zero the moments of features in every parameter that has a row per feature."""
        rows = self._transcoder.rows_of(features)
        for optimiser in self._optimisers:
            for parameter, state in optimiser.state.items():
                if (own := rows.get(self._names[parameter])) is not None:
                    for value in state.values():
                        if value.shape == parameter.shape:
                            value[own] = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return torch's state by kind and parameter."""
        return {
            f"optimiser.{key}.{self._names[parameter]}": value
            for optimiser in self._optimisers
            for parameter, state in optimiser.state.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                for parameter in group["params"]:
                    ending = f".{self._names[parameter]}"
                    own = {
                        key.removeprefix("optimiser.").removesuffix(ending): value
                        for key, value in tensors.items()
                        if key.startswith("optimiser.") and key.endswith(ending)
                    }
                    # torch keeps a step count on the host, but beside its parameter where a fused kernel reads it
                    fused = group.get("fused") or group.get("capturable")
                    optimiser.state[parameter] = {
                        key: value.to(parameter.device, copy=True) if value.ndim or fused else value.clone()
                        for key, value in own.items()
                    }


class BlockedAdam:
    """Adam on the CPU (Kingma & Ba 2015), row by row in one pass; the same numbers as torch's to rounding."""

    def __init__(self, transcoder: Transcoder, *, clip: float | None = None) -> None:
        self._transcoder, self._clip = transcoder, clip
        self._parameters = dict(transcoder.named_parameters())
        self._means = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._unit_rows = transcoder.unit_rows()
        self._n_steps = 0

    def step(self, lr: float) -> None:
        """Take one step."""
        self._n_steps += 1
        rate = lr / (1 - BETAS[0] ** self._n_steps)
        root = math.sqrt(1 - BETAS[1] ** self._n_steps)
        scale = self._clipping_scale()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            rows = [_rows(value) for value in (parameter, parameter.grad, self._means[name], self._squares[name])]
            numbers = (*BETAS, rate, root, EPSILON, scale, name in self._unit_rows)
            over_ranges(len(rows[0]), partial(loops.adam_rows, *rows, *numbers))

    def _clipping_scale(self) -> float:
        if self._clip is None:
            return 1.0
        self._transcoder.constrain_gradients()
        gradients = [value.grad for value in self._parameters.values() if value.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        return min(1.0, self._clip / (norm + 1e-6))

    def forget(self, features: Tensor) -> None:
        """Zero the moments of features in every parameter that has a row per feature."""
        for name, own in self._transcoder.rows_of(features).items():
            self._means[name][own] = 0
            self._squares[name][own] = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the moments and the number of steps."""
        tensors = {"optimiser.n_steps": torch.tensor(self._n_steps)}
        tensors |= {f"optimiser.mean.{name}": value for name, value in self._means.items()}
        return tensors | {f"optimiser.square.{name}": value for name, value in self._squares.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        self._n_steps = int(tensors["optimiser.n_steps"])
        for name in self._parameters:
            self._means[name].copy_(tensors[f"optimiser.mean.{name}"])
            self._squares[name].copy_(tensors[f"optimiser.square.{name}"])


def _rows(value: Tensor) -> np.ndarray:
    """View a parameter's memory as a NumPy matrix; a vector as one row."""
    array = value.detach().numpy()
    return array if array.ndim == 2 else array.reshape(1, -1)


def build_optimiser(
    kind: OptimiserKind,
    transcoder: Transcoder,
    *,
    lr: float,
    clip: float | None,
    gradients: DeviceGradients | None = None,
) -> Optimiser:
    """Return the optimiser called ``kind`` for a transcoder that lies on its device.

    ``gradients`` are those of a kernel for GPUs. Raises SettingsError where this torch has none of that name.
    """
    device = transcoder.W_enc.device
    if kind == "adam" and device.type == "cpu":
        return BlockedAdam(transcoder, clip=clip)
    if kind == "adam" and gradients is not None:
        # triton is optional
        from tailrace.training.kernels.device.adam import DeviceAdam

        return DeviceAdam(transcoder, gradients, clip=clip)
    parameters = list(transcoder.parameters())
    fused: Any = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    if kind == "muon":
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise SettingsError(f"optimiser: torch {torch.__version__} has no Muon, 2.9 and later have; use adam")
        weights = {"W_enc", *transcoder.unit_rows()}
        matrices = [value for name, value in transcoder.named_parameters() if name in weights]
        others = [value for name, value in transcoder.named_parameters() if name not in weights]
        torch_optimisers = [
            muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam(others, lr=lr, **fused),
        ]
    elif kind == "adamw":
        torch_optimisers = [torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, **fused)]
    else:
        torch_optimisers = [torch.optim.Adam(parameters, lr=lr, **fused)]
    return TorchOptimiser(transcoder, torch_optimisers, clip=clip, gradients=gradients)
