"""Replaces dead features by what rows suggest that the transcoder, or the language model with it, gets wrong.

Every draw is decided by (seed, purpose, step) and the counts of the current window are part of a checkpoint, so a
resumed run resamples what an uninterrupted one does.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.errors import NonFiniteActivation
from tailrace.storage.shuffle import philox
from tailrace.training.dead_features.resampling.settings import PeriodicResampling, ResampledRun, Surroundings
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.row_source import SampledRows

logger = logging.getLogger(__name__)

_BLOCK_ACTIVATIONS = 2**25
"""Activations held at a time while rows are scored: 128 MB in float32."""
_NO_DIRECTION = 1e-12
"""A row of a norm below this points nowhere."""


class PeriodicResampler(ABC):
    """Resamples every ``resample_every`` steps what was dead in a window of steps before, which is counted here.

    A resampled feature reads the centred input of its row and writes the direction of the row's output error (or of its
    centred output). Encoder rows get ``resample_scale`` times the mean norm of the living ones, and a bias that is zero
    about the inputs' centre. Moments, firing record and parameters that only the architecture has start anew, for
    these features alone.
    """

    def __init__(self, settings: PeriodicResampling, surroundings: Surroundings, *, n_rows: int) -> None:
        self._settings = settings
        self._around = surroundings
        self._source = settings.needed_rows(surroundings)
        self._n_rows = n_rows
        self._last_step = min(int(settings.resample_until * surroundings.n_steps), surroundings.n_steps - 1)
        self._n_fired = torch.zeros(surroundings.d_sae, dtype=torch.int64)
        self._rows_counted = 0
        self._n_resampled = 0
        self._ramp_from = -1

    @abstractmethod
    def weights(self, run: ResampledRun, rows: SampledRows, batch: Batch) -> np.ndarray:
        """Return float64 (rows,): how much each row should count; ``batch`` is ``rows`` normalised."""

    @abstractmethod
    def choose(self, generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
        """Return the indices of at most ``n`` rows."""

    def after_step(self, run: ResampledRun) -> Mapping[str, float]:
        """Count who fired; at the end of a window, resample. Return the number of features resampled until now."""
        every = self._settings.resample_every
        steps_left = -run.n_steps_done % every
        if run.n_steps_done <= self._last_step:
            if steps_left < self._settings.window_steps:
                assert run.latest is not None, "there was a step"
                self._n_fired = self._n_fired.to(run.latest.n_active.device) + run.latest.n_active
                self._rows_counted += run.latest_rows
            if steps_left == 0:
                self._end_window(run)
        return {"resampled_features": self._n_resampled}

    def lr_factor(self, step: int) -> float:
        """Return min(1, (steps since the last resampling + 1) / ramp), on top of the schedule, which goes on."""
        ramp = self._settings.resample_ramp_steps
        if self._ramp_from < 0 or ramp == 0:
            return 1.0
        return min(1.0, (step - self._ramp_from + 1) / ramp)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the counts of the window under way, and when and how much was resampled."""
        numbers = torch.tensor([self._rows_counted, self._n_resampled, self._ramp_from])
        return {"resampler.n_fired": self._n_fired, "resampler.numbers": numbers}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        self._n_fired = tensors["resampler.n_fired"].to(self._n_fired.device, copy=True)
        self._rows_counted, self._n_resampled, self._ramp_from = tensors["resampler.numbers"].tolist()

    def dead(self) -> Tensor:
        """Return the indices (n,) of the features that are dead by the counts of the window."""
        if self._settings.resample_dead_by == "no_fire":
            return (self._n_fired == 0).nonzero().squeeze(1)
        return (self._n_fired < self._settings.resample_threshold * self._rows_counted).nonzero().squeeze(1)

    def _end_window(self, run: ResampledRun) -> None:
        dead = self.dead()
        self._n_fired = torch.zeros_like(self._n_fired)
        self._rows_counted = 0
        n_replaced = self._resample(run, dead) if len(dead) else 0
        logger.info(
            "%s: step %d, %s features are dead, %s resampled", run.name, run.n_steps_done, len(dead), n_replaced
        )
        if n_replaced:
            self._n_resampled += n_replaced
            self._ramp_from = run.n_steps_done

    @torch.no_grad()
    def _resample(self, run: ResampledRun, dead: Tensor) -> int:
        step = run.n_steps_done
        rows = self._source(self._n_rows, step)
        batch = run.on_device.apply(rows.batch)
        weights = self.weights(run, rows, batch)
        if not np.isfinite(weights).all():
            raise NonFiniteActivation(
                f"{run.name}: resampling at step {step}, {np.count_nonzero(~np.isfinite(weights))} of {len(weights)} "
                "sampled rows have a loss that is not finite. The last checkpoint is kept: verify the cache, or start "
                "afresh with a lower lr or a gradient_clip"
            )
        generator = np.random.Generator(philox(self._around.seed, "resample/draw", step))
        chosen = torch.from_numpy(self.choose(generator, weights, len(dead))).to(batch.inputs.device)
        if len(chosen):
            # fewer rows than dead features: the others wait for the next time
            features = dead[: len(chosen)]
            alive = torch.ones(run.transcoder.d_sae, dtype=torch.bool, device=dead.device)
            alive[dead] = False
            self._replace(run, features, alive, Batch(batch.inputs[chosen], batch.outputs[chosen]))
            run.restart(features)
        return len(chosen)

    def _replace(self, run: ResampledRun, features: Tensor, alive: Tensor, batch: Batch) -> None:
        """Give ``features`` (n,) new weights, each from a row of ``batch``, at the inputs and outputs of its block."""
        transcoder = run.transcoder
        bias = transcoder.input_bias
        centre = self._around.mean_in.to(batch.inputs) if bias is None else bias
        centred, targets = batch.inputs - centre, batch.outputs - self._around.mean_out.to(batch.outputs)
        missed = errors(run, batch) if self._settings.resample_decoder == "error" else None
        for block in transcoder.blocks():
            chosen = block.own(features).to(batch.inputs.device)
            own = features[chosen.to(features.device)]
            rows = own - block.features.start
            living = transcoder.W_enc[block.features][alive[block.features]]
            mean_norm = torch.linalg.vector_norm(living, dim=1).mean() if len(living) else living.new_ones(())
            reads = _directions(centred[chosen][:, block.inputs], transcoder.W_enc[own])
            writes = _directions(targets[chosen][:, block.outputs], block.W_dec[rows])
            if missed is not None:
                writes = _directions(missed[chosen][:, block.outputs], writes)
            encoder = reads * (self._settings.resample_scale * mean_norm)
            transcoder.W_enc[own] = encoder
            transcoder.b_enc[own] = 0.0 - encoder @ centre[block.inputs] if bias is None else 0.0
            block.W_dec[rows] = writes


def errors(run: ResampledRun, batch: Batch) -> Tensor:
    """Return target − output (rows, d_out) of a normalised batch, as the transcoder is used, in normalised units."""
    blocks = [
        part.outputs - run.transcoder.decode(run.transcoder.encode(part.inputs), part.inputs)
        for part in _blocks(batch, max(1, _BLOCK_ACTIVATIONS // run.transcoder.d_sae))
    ]
    return torch.cat(blocks)


def squared_losses(run: ResampledRun, batch: Batch) -> np.ndarray:
    """Return float64 (rows,): the square of each row's squared error."""
    losses = errors(run, batch).double().square().sum(1)
    return np.asarray(losses.square().cpu().numpy())


def _blocks(batch: Batch, n_rows: int) -> Iterator[Batch]:
    for start in range(0, len(batch.inputs), n_rows):
        yield Batch(batch.inputs[start : start + n_rows], batch.outputs[start : start + n_rows])


def _directions(values: Tensor, otherwise: Tensor) -> Tensor:
    """Return rows (n, width) scaled to norm one; those that point nowhere as in ``otherwise``, scaled likewise."""
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    chosen = torch.where(norms > _NO_DIRECTION, values, otherwise)
    directions: Tensor = chosen / torch.linalg.vector_norm(chosen, dim=1, keepdim=True).clamp_min(_NO_DIRECTION)
    return directions


def draw_distinct(generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """Return int64 indices of at most ``n`` different rows, one after another ∝ ``weights`` (float64, at least 0).

    Rows of weight zero are never drawn, so there may be fewer; if all weights are zero, all rows are equally likely.
    (Efraimidis & Spirakis 2006: the smallest of exponential variables divided by the weights.)
    """
    weights = _usable(weights)
    waiting = np.full(len(weights), np.inf)
    np.divide(generator.standard_exponential(len(weights)), weights, out=waiting, where=weights > 0)
    n = min(n, int(np.count_nonzero(weights)))
    return np.asarray(np.argsort(waiting, kind="stable")[:n])


def draw_repeated(generator: np.random.Generator, weights: np.ndarray, n: int) -> np.ndarray:
    """Return int64 indices of ``n`` rows ∝ ``weights``, a row maybe several times; uniform if all weights are zero."""
    weights = _usable(weights)
    if not len(weights):
        return np.zeros(0, np.int64)
    ends = np.cumsum(weights)
    drawn = np.searchsorted(ends, generator.random(n) * ends[-1], side="right")
    # the product can round up to the total itself, which lies behind the last row that has a weight
    return np.asarray(np.minimum(drawn, np.flatnonzero(weights)[-1]))


def _usable(weights: np.ndarray) -> np.ndarray:
    """Return weights whose sum is finite and not zero, in the same proportions where they have any."""
    largest = weights.max(initial=0.0)
    if largest <= 0:
        return np.ones(len(weights))
    return np.asarray(weights / largest, np.float64)
