"""One transcoder being trained: its weights, its optimiser, and what one batch does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.storage.errors import NonFiniteActivation, NoOrdinaryRows
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.architectures.schedule import Schedule
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.dead_features.resampling.settings import Resampler
from tailrace.training.kernels.kernel import ExtraLoss, StatefulKernel, StepKernel, StepResult
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.evaluate import HeldoutScore, evaluate, in_pieces, predictor, score_layers
from tailrace.training.loop.optim import Optimiser
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch, SiteBatches
from tailrace.training.rows.learnt_rows import LearntRows
from tailrace.training.rows.normalisation import AnyNormalisation

CHECK_EVERY = 50
"""Steps between looks at the loss on a device where looking makes the host wait."""


class TrainingRun:
    """Trains one transcoder on the raw batches of its sites.

    The order inside a step is fixed: gradients, parallel part off, clipping, optimiser, unit norm, average, resampling.
    """

    def __init__(
        self,
        transcoder: Transcoder,
        objective: Objective,
        rows: LearntRows,
        kernel: StepKernel,
        optimiser: Optimiser,
        schedule: Schedule,
        *,
        lr: float,
        firing: FiringRecord | None = None,
        extra: Sequence[ExtraLoss] = (),
        resampler: Resampler | None = None,
        average: WeightAverage | None = None,
        name: str = "transcoder",
    ) -> None:
        self.transcoder = transcoder
        self.objective = objective
        self.rows = rows
        self.optimiser = optimiser
        self.schedule = schedule
        self.lr = lr
        self.name = name
        self.n_steps_done = 0
        self.n_rows_done = 0
        self.latest: StepResult | None = None
        self.latest_rows = 0
        self.latest_lr = 0.0
        self.latest_extras: Mapping[str, float] = {}
        self.wants_rows: Callable[[int], bool] = lambda _: False
        """After which steps (counted from 1) the latest result must have its ``per_row`` part."""
        device = transcoder.W_enc.device
        self.firing = FiringRecord(transcoder.d_sae, device) if firing is None else firing
        self._rows_on_device = rows.to(device, transcoder.W_enc.dtype)
        self._kernel = kernel
        self._extra = extra
        self._resampler = resampler
        self._average = average
        self.tensor_cores = False
        """Whether float32 products of auxiliary losses and scores may be TF32 on a GPU."""
        self._check_every = 1 if device.type == "cpu" else CHECK_EVERY
        self._parameters = dict(transcoder.named_parameters())

    def step(self, batches: SiteBatches) -> None:
        """Take one optimiser step on raw rows.

        Raises NonFiniteActivation before a bad loss reaches the weights, NoOrdinaryRows where nothing can be learnt.
        """
        batch = self._learnt_from(batches)
        self.transcoder.begin_step(self.n_steps_done)
        per_row = self.wants_rows(self.n_steps_done + 1)
        with self._products():
            result = self._kernel(self.transcoder, batch, self.objective, self._extra, per_row=per_row)
        if per_row or (self.n_steps_done + 1) % self._check_every == 0:
            self._refuse_non_finite(result.losses["loss"])
        self.latest_lr = self.current_lr
        self.optimiser.step(self.latest_lr)
        if self._average is not None:
            self._average.update()
        self.firing.update(result.n_active)
        self.latest, self.latest_rows = result, result.n_rows
        self.n_steps_done += 1
        self.n_rows_done += result.n_rows
        if self._resampler is not None:
            self.latest_extras = self._resampler.after_step(self)

    def _learnt_from(self, raw: SiteBatches) -> Batch:
        batch = self._rows_on_device(raw)
        if not len(batch.inputs):
            n_rows = len(raw[self.rows.sites[0]].inputs)
            raise NoOrdinaryRows(
                f"{self.name}: max_norm_multiple leaves none of the {n_rows} rows of step {self.n_steps_done + 1} to "
                "learn from. What there is from before is kept, but continuing would end here again: raise it, or "
                "batch_rows, and start anew, with --fresh"
            )
        return batch

    @property
    def normalisation(self) -> AnyNormalisation:
        """From raw rows to normalised ones."""
        return self.rows.normalisation

    @property
    def on_device(self) -> AnyNormalisation:
        """The same, where the weights lie."""
        return self._rows_on_device.normalisation

    @property
    def current_lr(self) -> float:
        """The learning rate of the next step."""
        factor = 1.0 if self._resampler is None else self._resampler.lr_factor(self.n_steps_done)
        return self.lr * self.schedule.factor(self.n_steps_done) * factor

    def restart(self, features: Tensor) -> None:
        """Forget the past of features (n,), by index, that were just given new weights."""
        self.transcoder.restart_own(features)
        self.optimiser.forget(features)
        self.firing.restart(features)
        if self._average is not None:
            self._average.restart(features)

    @property
    def scored(self) -> Transcoder:
        """The transcoder that is scored and published, in normalised units: the averaged one if there is one."""
        return self.transcoder if self._average is None else self._average.transcoder

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted raw outputs of raw inputs, and which features fired, bool (rows, d_sae)."""
        outputs, active = predictor(self.scored)(self.on_device.inputs(inputs))
        return self.on_device.restore(outputs), active

    def score(self, batches: Iterable[SiteBatches]) -> HeldoutScore:
        """Return the score on raw ``batches``; of several layers, on the rows that are learnt from, each in its units.

        Layers differ in scale by orders of magnitude: in normalised units every one counts alike.
        """
        if len(self.rows.sites) == 1:
            (site,) = self.rows.sites
            with self._products():
                return evaluate(self.predict, (batch[site] for batch in batches), self.rows.ordinary.get(site))
        joined = map(self._rows_on_device, in_pieces(batches, self.scored.d_sae))
        with self._products():
            return evaluate(predictor(self.scored), (batch for batch in joined if len(batch.inputs)))

    @contextmanager
    def _products(self) -> Iterator[None]:
        """Multiply float32 in TF32 inside, if that is wanted: 10 bits of mantissa, several times as fast.

        Nothing else in the process is: a language model that runs between steps keeps its own precision.
        """
        before = torch.get_float32_matmul_precision()
        if self.tensor_cores:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            if self.tensor_cores:
                torch.set_float32_matmul_precision(before)

    def folded(self) -> Transcoder:
        """Return the transcoder as it would be published: raw inputs to raw outputs, on the CPU."""
        return self.scored.folded(self.normalisation)

    def score_layers(self, batches: Iterable[SiteBatches]) -> Mapping[str, HeldoutScore]:
        """Return by site the score of each layer's output on raw ``batches``, of a cross-layer transcoder."""
        transcoder = self.folded().to(self.transcoder.W_enc.device)
        assert isinstance(transcoder, CrossLayerTranscoder), "that is what a stack becomes"
        return score_layers(transcoder, self.rows.sites, batches, self.rows.mask)

    def _all_finite(self, *values: Tensor) -> bool:
        return bool(torch.stack([torch.isfinite(value).all() for value in values]).all())

    def _refuse_non_finite(self, *values: Tensor) -> None:
        if self._all_finite(*values):
            return
        raise NonFiniteActivation(
            f"{self.name}: the loss or a weight is not finite at step {self.n_steps_done + 1} "
            f"(learning rate {self.current_lr:.3g}). Checkpoints from before are kept, but continuing would end "
            "here again: verify the cache, or start afresh with a lower lr or a gradient_clip"
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything a step depends on, by name. Raises NonFiniteActivation rather than keep a bad weight."""
        self._refuse_non_finite(*self._parameters.values())
        return self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.firing.state_tensors())
        tensors |= {f"transcoder.{name}": value for name, value in self.transcoder.state_dict().items()}
        tensors |= self.optimiser.state_tensors()
        if self._average is not None:
            tensors |= self._average.state_tensors()
        if self._resampler is not None:
            tensors |= self._resampler.state_tensors()
        return tensors

    def state(self) -> dict[str, Any]:
        """Return the rest of what a step depends on, as JSON."""
        return {"kernel": self._kernel.state() if isinstance(self._kernel, StatefulKernel) else None}

    def release(self) -> None:
        """Let go of what the run has claimed: it is over."""

    def checkpoints(self, directory: Path) -> Checkpoints:
        """Return the run's checkpoints in ``directory``."""
        return Checkpoints(directory)

    @torch.no_grad()
    def load_state(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, n_steps_done: int, n_rows_done: int
    ) -> None:
        """Continue from ``state_tensors`` and ``state``."""
        self.n_steps_done, self.n_rows_done = n_steps_done, n_rows_done
        self.firing.load_state(tensors)
        own = self.transcoder.state_dict()
        for name in own:
            own[name].copy_(tensors[f"transcoder.{name}"])
        self.optimiser.load_state(tensors)
        if self._average is not None:
            self._average.load_state(tensors)
        if self._resampler is not None:
            self._resampler.load_state(tensors)
        if isinstance(self._kernel, StatefulKernel):
            self._kernel.load_state(state["kernel"])
