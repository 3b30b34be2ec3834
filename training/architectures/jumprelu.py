"""ReLU that jumps: a feature fires with its full pre-activation above a threshold learnt for it, and L0 is the penalty.

A step has no slope, so a threshold learns through straight-through estimators: near it, within half a bandwidth, the
step counts as if it had the slope of a rectangle (Rajamanoharan et al. 2024, "Jumping ahead", section 3).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, Entries
from tailrace.training.architectures.relu import total
from tailrace.training.architectures.schedule import warmed_up
from tailrace.training.architectures.settings import JumpReLU


class _Jump(torch.autograd.Function):
    """``p · 1[p > θ]``; the threshold's gradient is −(θ/ε) · 1[|p − θ| < ε/2] of the activation's."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        of_threshold = gradient * near * (-threshold / ctx.bandwidth)
        return gradient * (pre > threshold), _reduced(of_threshold, threshold), None


class _Step(torch.autograd.Function):
    """``1[p > θ]``; the threshold's gradient is −(1/ε) · 1[|p − θ| < ε/2], the pre-activation has none."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, _reduced(gradient * near / -ctx.bandwidth, threshold), None


def _reduced(gradient: Tensor, threshold: Tensor) -> Tensor:
    """Sum over rows where one threshold stood for a whole column."""
    return gradient if gradient.shape == threshold.shape else gradient.sum(0)


class JumpReLUTranscoder(Transcoder):
    """``p · 1[p > θ]`` of ``p = W_enc x + b_enc``, with a threshold θ = exp(log_threshold) per feature.

    Loss term ``sparsity``: l0 · mean L0, or l0 · (mean L0 / target − 1)² where a target is set.
    """

    needs_float32: ClassVar[bool] = True  # the window around a threshold is as narrow as bfloat16's steps

    log_threshold: nn.Parameter
    """(d_sae,)."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: JumpReLU) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=settings.input_bias, skip=settings.skip)
        self._settings = settings
        self.l0 = settings.l0
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))

    @property
    def threshold(self) -> Tensor:
        """(d_sae,), positive."""
        return self.log_threshold.exp()

    @property
    def bandwidth(self) -> float:
        """ε in the units of activations."""
        return self._settings.bandwidth * self.activation_unit

    @torch.no_grad()
    def initialise_own(self) -> None:
        """Set all thresholds to the initial one."""
        self.log_threshold.fill_(self._initial_log_threshold)

    @torch.no_grad()
    def restart_own(self, features: Int[Tensor, " n"]) -> None:
        """Set the thresholds of features to the initial one."""
        self.log_threshold[features] = self._initial_log_threshold

    @property
    def _initial_log_threshold(self) -> float:
        return math.log(self._settings.initial_threshold * self.activation_unit)

    def begin_step(self, step: int) -> None:
        """Raise the penalty linearly from zero over its warm-up."""
        self.l0 = self._settings.l0 * warmed_up(step, self._settings.l0_warmup_steps)

    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the pre-activations above their thresholds, zero elsewhere."""
        return pre_activations * (pre_activations > self.threshold)

    def selection_in_use(self) -> Above:
        """Return all pairs above their thresholds."""
        return Above(self.threshold.detach())

    def selection(self) -> Above:
        """Return all pairs above the lower edge of the threshold's bandwidth: below, nothing is passed on."""
        return Above(self.threshold.detach() - self.bandwidth / 2)

    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the pre-activations above their thresholds, zero elsewhere."""
        activations: Tensor = _Jump.apply(entries.pre, entries.at(self.threshold), self.bandwidth)  # type: ignore[no-untyped-call]
        return activations

    def penalties(self, entries: Entries, activations: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the weighted L0."""
        fires: Tensor = _Step.apply(entries.pre, entries.at(self.threshold), self.bandwidth)  # type: ignore[no-untyped-call]
        mean_l0 = entries.reductions.mean(entries.reductions.over_features(total(fires) / entries.n_rows))
        target = self._settings.target_l0
        return {"sparsity": self.l0 * (mean_l0 if target is None else (mean_l0 / target - 1).square())}

    @torch.no_grad()
    def scale_activations(self, factor: float) -> None:
        """Scale the thresholds with the activations."""
        self.log_threshold.add_(math.log(factor))


def build(settings: JumpReLU, d_in: int, d_out: int, d_sae: int) -> JumpReLUTranscoder:
    """Return the module with all weights zero."""
    return JumpReLUTranscoder(d_in, d_out, d_sae, settings=settings)
