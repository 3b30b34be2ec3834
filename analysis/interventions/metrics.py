"""What an intervention is judged by: one number per prompt, from its logits or from a feature of a transcoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tailrace.analysis.interventions.forward import ForwardPass
from tailrace.analysis.splice.replacement import weights_dtype
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError


class Metric(ABC):
    """A number per prompt, float64 on the host."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks it needs to see."""
        return ()

    @abstractmethod
    def __call__(self, run: ForwardPass) -> Tensor:
        """Return (prompts,) float64 of a pass in which ``hooks`` were observed."""


class LastLogits(Metric):
    """Any function of the logits (prompts, vocab), float64, at each prompt's last token; it returns (prompts,)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the function's values."""
        return self._function(run.last_logits.cpu().double())


class LogitDifference(Metric):
    """Logit of one token less that of another at the last token; a token for all prompts, or one for each."""

    def __init__(self, correct: int | Sequence[int], incorrect: int | Sequence[int]) -> None:
        self._correct, self._incorrect = torch.tensor(correct), torch.tensor(incorrect)

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the differences."""
        logits = run.last_logits.cpu().double()
        return _chosen(logits, self._correct) - _chosen(logits, self._incorrect)


class EncoderCoder(Protocol):
    """The part of a transcoder that says what one of its features reads."""

    def pre_activations_of(self, features: Tensor, inputs: Tensor, /) -> Tensor:
        """Return (rows, n) what features (n,) make of inputs (rows, d_in) before the activation function."""
        ...


class FeaturePreActivation(Metric):
    """What a transcoder's feature reads, W_enc[i]·x + b_enc[i], at the last token or at ``position`` of each prompt.

    It is linear in what its site's input hook holds, so it moves before the feature fires and after it stops. The
    transcoder need not be in place.
    """

    def __init__(self, coder: EncoderCoder, site: Site, feature: int, position: int = -1) -> None:
        d_sae = getattr(coder, "d_sae", None)
        if isinstance(d_sae, int) and not 0 <= feature < d_sae:
            raise ModelError(f"site {site.name}: there is no feature {feature}; there are 0 to {d_sae - 1}")
        self._coder, self._feature, self._position = coder, feature, position
        self._hook = HookName.parse(site.hook_in)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The site's input."""
        return (self._hook.point,)

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the pre-activations."""
        values = run.observed[self._hook.point]
        if self._hook.head is not None:
            values = values[:, :, self._hook.head]
        rows = values.flatten(2)[run.prompts.at(self._position).to(values.device)]
        rows = rows.to(weights_dtype(self._coder, rows.dtype))
        feature = torch.tensor([self._feature], device=rows.device)
        return self._coder.pre_activations_of(feature, rows)[:, 0].cpu().double()


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return (prompts,) the logits of one token for all prompts, or of one token each."""
    return logits.gather(1, tokens.expand(len(logits))[:, None])[:, 0]
