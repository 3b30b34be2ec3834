"""One transcoder being trained: its weights, its optimiser, and what one batch does to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from storage.errors import NonFiniteActivation
from training.architectures.base import Transcoder
from training.batches import Batch
from training.dead_features import FiringRecord
from training.normalisation import Normalisation
from training.objectives import Objective
from training.schedule import Schedule
from training.step import StepKernel, StepResult

CHECK_EVERY = 50
"""Steps between looks at the loss on a device where looking makes the host wait."""


class TrainingRun:
    """Trains one transcoder on raw batches.

    The order inside a step is fixed: gradients, parallel part off, clipping, Adam, unit norm.
    """

    def __init__(
        self,
        transcoder: Transcoder,
        objective: Objective,
        normalisation: Normalisation,
        kernel: StepKernel,
        schedule: Schedule,
        *,
        lr: float,
        gradient_clip: float | None = None,
        name: str = "transcoder",
    ) -> None:
        self.transcoder = transcoder
        self.normalisation = normalisation
        self.schedule = schedule
        self.lr = lr
        self.name = name
        self.n_steps_done = 0
        self.n_rows_done = 0
        self.latest: StepResult | None = None
        self.latest_rows = 0
        self.latest_lr = 0.0
        device = transcoder.W_enc.device
        self.firing = FiringRecord(transcoder.d_sae, device)
        self._on_device = normalisation.to(device, transcoder.W_enc.dtype)
        self._objective = objective
        self._kernel = kernel
        self._gradient_clip = gradient_clip
        self._check_every = 1 if device.type == "cpu" else CHECK_EVERY
        self._parameters = dict(transcoder.named_parameters())
        self._optimiser = build_adam(list(self._parameters.values()), lr)

    def step(self, batch: Batch) -> None:
        """Take one optimiser step on raw rows. Raises NonFiniteActivation before a bad loss reaches the weights."""
        result = self._kernel(self.transcoder, self._on_device.apply(batch), self._objective)
        if (self.n_steps_done + 1) % self._check_every == 0:
            self._refuse_non_finite(result.losses["loss"])
        self.transcoder.constrain_gradients()
        if self._gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._gradient_clip)
        for group in self._optimiser.param_groups:
            group["lr"] = self.current_lr
        self.latest_lr = self.current_lr
        self._optimiser.step()
        self.transcoder.constrain_parameters()
        self.firing.update(result.n_active)
        self.latest, self.latest_rows = result, len(batch.inputs)
        self.n_steps_done += 1
        self.n_rows_done += len(batch.inputs)

    @property
    def current_lr(self) -> float:
        """The learning rate of the next step."""
        return self.lr * self.schedule.factor(self.n_steps_done)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted raw outputs of raw inputs and how often each feature fired."""
        trace = self.transcoder.trace(self._on_device.inputs(inputs))
        return self._on_device.restore(trace.outputs), trace.n_active

    def folded(self) -> Transcoder:
        """Return the transcoder as it would be published: raw inputs to raw outputs, on the CPU."""
        return self.transcoder.folded(self.normalisation)

    def _refuse_non_finite(self, *values: Tensor) -> None:
        if all(bool(torch.isfinite(value).all()) for value in values):
            return
        raise NonFiniteActivation(
            f"{self.name}: the loss or a weight is not finite at step {self.n_steps_done + 1} "
            f"(learning rate {self.current_lr:.3g}). The last checkpoint is kept, but continuing it would end here "
            "again: verify the cache, or start afresh with a lower lr or a gradient_clip"
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything a step depends on, by name. Raises NonFiniteActivation rather than keep a bad weight."""
        self._refuse_non_finite(*self._parameters.values())
        tensors = {"steps_since_fired": self.firing.steps_since_fired}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self._optimiser.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], *, n_steps_done: int, n_rows_done: int) -> None:
        """Continue from ``state_tensors``."""
        self.n_steps_done, self.n_rows_done = n_steps_done, n_rows_done
        self.firing.steps_since_fired.copy_(tensors["steps_since_fired"])
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            self._optimiser.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }


def build_adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Return Adam in its fused form, 8 times faster than the plain loop on a CPU, where the device has it."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(parameters, lr=lr, fused=fused, foreach=None if fused else True)
