"""A transcoder as an affine map, a threshold per feature and a second affine map: what other tools can hold.

Every architecture but TopK is of this form exactly. A gated feature's magnitude is m = exp(r) π + b_mag of its gate π,
so the gate is open (π > 0) just where m > b_mag, and the feature is JumpReLU of m with the threshold max(b_mag, 0)
(Rajamanoharan et al. 2024, "Jumping ahead", section 2). TopK compares features of a row with each other, which no
threshold does: it needs some that stand in for k (``tailrace.pipeline.formats.calibration``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.analysis.weights.model_weights import Norm
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.batch_topk import BatchTopKTranscoder
from tailrace.training.architectures.gated import GatedTranscoder
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.relu import ReLUTranscoder
from tailrace.training.architectures.topk import TopKTranscoder


@dataclass(frozen=True)
class JumpForm:
    """``y = a W_dec + b_dec + W_skip x`` with ``a = p · 1[p > θ]`` and ``p = W_enc x + b_enc``; float32, on the CPU."""

    W_enc: Tensor
    """(d_sae, d_in)."""
    b_enc: Tensor
    """(d_sae,)."""
    W_dec: Tensor
    """(d_sae, d_out)."""
    b_dec: Tensor
    """(d_out,), added to the output."""
    threshold: Tensor | None = None
    """(d_sae,) θ, nowhere below 0; None for ReLU."""
    W_skip: Tensor | None = None
    """(d_out, d_in)."""

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the outputs."""
        return int(self.W_dec.shape[1])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[0])

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the activations (…, d_sae) of inputs (…, d_in)."""
        pre = F.linear(inputs, self.W_enc, self.b_enc)
        return pre.relu() if self.threshold is None else pre * (pre > self.threshold)

    def decode(self, activations: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs (…, d_out) of activations (…, d_sae); inputs (…, d_in) go through the skip path."""
        outputs = activations @ self.W_dec + self.b_dec
        return outputs if self.W_skip is None else outputs + F.linear(inputs, self.W_skip)

    def before_gain(self, norm: Norm) -> Self:
        """Return the same function of the norm's output *before* its gain and bias, ``ln2.hook_normalized``.

        x = weight · n + bias, so W x + b = (W diag(weight)) n + (b + W bias); in float64, rounded once.
        """
        weight = torch.ones(self.d_in) if norm.weight is None else norm.weight.cpu()
        bias = torch.zeros(self.d_in) if norm.bias is None else norm.bias.cpu()
        changed = {
            "W_enc": _rounded(self.W_enc.double() * weight.double()),
            "b_enc": _rounded(self.b_enc.double() + self.W_enc.double() @ bias.double()),
        }
        if self.W_skip is not None:
            changed["W_skip"] = _rounded(self.W_skip.double() * weight.double())
            changed["b_dec"] = _rounded(self.b_dec.double() + self.W_skip.double() @ bias.double())
        return replace(self, **changed)


@torch.no_grad()
def jump_form(transcoder: Transcoder, threshold: Tensor | None = None) -> JumpForm:
    """Return a folded transcoder in the common form; TopK, and nothing else, needs a ``threshold`` (d_sae,).

    BatchTopK and Matryoshka have the threshold that they use themselves. A threshold of 0 is ReLU.
    """
    assert (threshold is not None) == isinstance(transcoder, TopKTranscoder), "thresholds are given just where k is"
    common = JumpForm(
        W_enc=transcoder.W_enc.detach().clone(),
        b_enc=transcoder.encoder_bias().detach().clone(),
        W_dec=transcoder.W_dec.detach().clone(),
        b_dec=transcoder.b_dec_out.detach().clone(),
        W_skip=None if transcoder.W_skip is None else transcoder.W_skip.detach().clone(),
    )
    match transcoder:
        case ReLUTranscoder():
            return common
        case GatedTranscoder():
            scale = transcoder.r_mag.double().exp()
            return _thresholded(
                replace(
                    common,
                    W_enc=_rounded(common.W_enc.double() * scale[:, None]),
                    b_enc=_rounded(common.b_enc.double() * scale + transcoder.b_mag.double()),
                ),
                transcoder.b_mag.detach().clamp(min=0),
            )
        case JumpReLUTranscoder() | BatchTopKTranscoder():
            return _thresholded(common, transcoder.threshold.detach().expand(common.d_sae))
        case TopKTranscoder():
            assert threshold is not None
            return _thresholded(common, threshold)
    raise AssertionError(f"{type(transcoder).__name__} has no form with thresholds yet")


def _thresholded(form: JumpForm, threshold: Tensor) -> JumpForm:
    return replace(form, threshold=threshold.clone() if bool((threshold > 0).any()) else None)


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.float32)
