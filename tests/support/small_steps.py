"""Steps of a GPU on a few rows and features, their programs interpreted."""

from __future__ import annotations

from tests.support import interpreted  # isort: skip  (before anything that imports the programs)

from typing import Any

import torch

from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device.adam import DeviceAdam
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep
from tailrace.training.rows.batches import Batch

assert interpreted.__doc__

OBJECTIVE = VarianceObjective(5.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_random_weights(transcoder: Transcoder) -> Transcoder:
    transcoder = transcoder.double()
    with torch.no_grad():
        for index, parameter in enumerate(transcoder.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator(index)))
        transcoder.W_enc.mul_(3 * torch.rand(len(transcoder.W_enc), 1, dtype=torch.float64, generator=generator(50)))
    transcoder.constrain_parameters()
    return transcoder


def small_step(**changes: Any) -> tuple[Transcoder, DeviceStep, DeviceAdam, Batch]:
    transcoder = with_random_weights(TopK(k=2).build(4, 3, 12)).float()
    step = DeviceStep(DeviceGradients(fused=True))
    step.gradients.trusted = True
    inputs = torch.randn(5, 4, generator=generator(5))
    for row, value in changes.items():
        inputs[int(row[1:])] = value
    return transcoder, step, DeviceAdam(transcoder, step.gradients), Batch(inputs, torch.zeros(5, 3))


class CountedStep(DeviceStep):
    """A dense step that says it is a GPU's, with as many candidates as it is told."""

    n_wanted = 20

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.gradients.n_candidates = torch.tensor(self.n_wanted)
        return DenseStep()(*arguments, **keywords)
