"""A running mean of the weights, which is scored and published in place of the latest ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from tailrace.training.architectures.base import Transcoder


class WeightAverage:
    """Exponential moving average: a weight counts ``decay`` times as much with every step that passes.

    For the first steps, 1 / decay of which would hardly have been counted, the plain mean is taken instead.
    """

    def __init__(self, transcoder: Transcoder, decay: float) -> None:
        self._source, self._decay, self._n_steps = transcoder, decay, 0
        self.transcoder = copy.deepcopy(transcoder).requires_grad_(False)
        """The averaged transcoder; decoder rows have unit norm."""

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now."""
        self._n_steps += 1
        share = max(1 - self._decay, 1 / self._n_steps)
        own = list(self.transcoder.state_dict().values())
        torch._foreach_lerp_(own, list(self._source.state_dict().values()), share)
        self.transcoder.constrain_parameters()

    @torch.no_grad()
    def restart(self, features: Tensor) -> None:
        """Take features (n,), by index, as they are now: what they were before they were replaced does not count."""
        for name, rows in self._source.rows_of(features).items():
            self.transcoder.get_parameter(name)[rows] = self._source.get_parameter(name)[rows]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights and the number of steps."""
        averaged = {f"average.{name}": value for name, value in self.transcoder.state_dict().items()}
        return {"average_steps": torch.tensor(self._n_steps), **averaged}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        self._n_steps = int(tensors["average_steps"])
        own = self.transcoder.state_dict()
        for name in own:
            own[name].copy_(tensors[f"average.{name}"])
