"""Adam on a GPU: a program a feature, which sums the feature's gradient where it is given at pairs.

Such a gradient never lies in memory, and a row's weights, moments and screened copy are read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailrace.training.architectures.base import Transcoder
from tailrace.training.kernels.device import operators
from tailrace.training.kernels.device.step import DeviceGradients

BETAS = (0.9, 0.999)
EPSILON = 1e-8

_FROM_TORCH = {"mean": "exp_avg", "square": "exp_avg_sq"}
"""What torch's own Adam calls its moments, in checkpoints of runs that began with it."""


class DeviceAdam:
    """The steps of ``BlockedAdam``, with its state by the same names; nothing waits, clipping included."""

    def __init__(self, transcoder: Transcoder, gradients: DeviceGradients, *, clip: float | None = None) -> None:
        self._transcoder, self._gradients, self._clip = transcoder, gradients, clip
        self._parameters = dict(transcoder.named_parameters())
        self._means = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._unit_rows = transcoder.unit_rows()
        device = transcoder.W_enc.device
        self._numbers = torch.zeros(3, device=device)
        self._no_overflow = torch.zeros(1, dtype=torch.int32, device=device)
        self._n_steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step; none where the pairs of the gradient did not fit."""
        self._n_steps += 1
        rate = lr / (1 - BETAS[0] ** self._n_steps)
        per_root = 1 / math.sqrt(1 - BETAS[1] ** self._n_steps)
        if not self._gradients.trusted:
            self._plain_step(lr)
            return
        operators.write_numbers(self._numbers, rate, per_root, 1.0)
        if self._clip is not None:
            self._transcoder.constrain_gradients()
            self._numbers[2] = self._clipping_scale()
        overflow = self._no_overflow if self._gradients.overflow is None else self._gradients.overflow
        for name, parameter in self._parameters.items():
            at_pairs, gradient = self._gradients.at_pairs.get(name), parameter.grad
            state = (parameter.detach(), self._means[name], self._squares[name])
            if name == "W_enc" or name in self._unit_rows:
                if at_pairs is None and gradient is None:
                    continue
                pairs = [] if at_pairs is None else at_pairs.pairs
                taken_off = None if at_pairs is None or at_pairs.taken_off is None else at_pairs.taken_off.detach()
                row_offset = 0 if at_pairs is None else at_pairs.row_offset
                screened = self._gradients.screen.features if name == "W_enc" else None
                rest = (self._numbers, overflow, gradient, pairs, taken_off, row_offset, name in self._unit_rows)
                operators.adam_rows(*state, screened, *rest)
            elif gradient is not None:
                operators.adam_numbers(*state, gradient.contiguous(), self._numbers, overflow)
        self._gradients.screen.is_fresh(self._transcoder.W_enc)

    def _plain_step(self, lr: float) -> None:
        """Take the step by torch's operators alone."""
        self._transcoder.constrain_gradients()
        moved = {name: value for name, value in self._parameters.items() if value.grad is not None}
        gradients = [value.grad for value in moved.values() if value.grad is not None]
        if self._clip is not None:
            torch._foreach_mul_(gradients, self._clipping_scale())
        torch._fused_adam_(
            list(moved.values()),
            gradients,
            [self._means[name] for name in moved],
            [self._squares[name] for name in moved],
            [],
            [torch.full((), float(self._n_steps), device=value.device) for value in moved.values()],
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        self._transcoder.constrain_parameters()

    def _clipping_scale(self) -> Tensor:
        assert self._clip is not None, "asked for where there is a bound"
        gradients = [value.grad for value in self._parameters.values() if value.grad is not None]
        return (self._clip / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)

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
        """Continue from ``state_tensors``, or from those of torch's Adam, which earlier releases used here."""
        n_steps = tensors.get("optimiser.n_steps", tensors.get("optimiser.step.W_enc"))
        assert n_steps is not None, "a checkpoint of Adam counts its steps"
        self._n_steps = int(n_steps)
        for kind, values in (("mean", self._means), ("square", self._squares)):
            for name, value in values.items():
                own = tensors.get(f"optimiser.{kind}.{name}", tensors.get(f"optimiser.{_FROM_TORCH[kind]}.{name}"))
                if own is not None:
                    value.copy_(own)
