"""The settings of every resampling, the list of them, and what a resampling is given and gives. They need no torch.

To add one: a class here, its name in ``AnyResampling``, and a file named by its ``kind`` with what resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, Self, get_args

from pydantic import Field, PositiveFloat, model_validator

from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Quantity, Settings, code_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tailrace.training.architectures.base import Transcoder
    from tailrace.training.kernels.kernel import StepResult
    from tailrace.training.rows.normalisation import AnyNormalisation
    from tailrace.training.rows.row_source import RowSource

DecoderFrom = Literal["error", "target"]


class ResampledRun(Protocol):
    """What a resampler reads and changes of the run whose features it gives new weights."""

    @property
    def name(self) -> str:
        """What messages call the run."""
        ...

    @property
    def n_steps_done(self) -> int:
        """Steps finished."""
        ...

    @property
    def latest(self) -> StepResult | None:
        """What the last step counted; None before the first."""
        ...

    @property
    def latest_rows(self) -> int:
        """Rows of the last step."""
        ...

    @property
    def transcoder(self) -> Transcoder:
        """The weights being trained, in normalised units."""
        ...

    @property
    def normalisation(self) -> AnyNormalisation:
        """From raw rows to normalised ones."""
        ...

    @property
    def on_device(self) -> AnyNormalisation:
        """The same, where the weights lie."""
        ...

    def restart(self, features: Tensor) -> None:
        """Forget what the optimiser and the firing record know of ``features`` (n,)."""
        ...


class Resampler(Protocol):
    """Gives dead features new weights between steps."""

    def after_step(self, run: ResampledRun) -> Mapping[str, float]:
        """Change weights of ``run`` if it is time to; return what to log of it."""
        ...

    def lr_factor(self, step: int) -> float:
        """Return what the learning rate is multiplied by in ``step`` on top of its schedule."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        ...


class RowScorer(Protocol):
    """How much a row matters, such as by how much a language model's loss rises there with the transcoder in place."""

    def __call__(self, transcoder: Transcoder, contexts: np.ndarray, positions: np.ndarray, /) -> np.ndarray:
        """Return float64 (rows,), at least 0, for a folded transcoder at rows given by context and position."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """What a resampler is given of the run it is built for."""

    d_sae: int
    n_steps: int
    seed: int
    mean_in: Tensor
    """(d_in,), of the normalised inputs."""
    mean_out: Tensor
    """(d_out,), of the normalised outputs."""
    row_source: RowSource | None
    row_scorer: RowScorer | None


class Resampling(Settings):
    """Settings of one resampling. A subclass adds ``kind: Literal[…]``, by which files and flags name it;
    the file of that name beside this one has what resamples, and a function ``build`` that makes it."""

    def build(self, surroundings: Surroundings) -> Resampler | None:
        """Return what resamples, None for nothing; raise SettingsError if it needs what the run has not got."""
        built: Resampler = code_of(self).build(self, surroundings)
        return built


class NoResampling(Resampling):
    """No resampling."""

    kind: Literal["none"] = "none"

    def build(self, surroundings: Surroundings) -> None:
        """Return None."""


class PeriodicResampling(Resampling):
    """Settings of the ways that replace features every so many steps by what sampled rows suggest."""

    resample_every: Quantity = Field(default=2500, ge=1)
    """Steps between resamplings."""
    resample_window: Quantity | None = Field(default=None, ge=1)
    """Steps before a resampling in which it is counted how often features fire; by default half of resample_every."""
    resample_until: PositiveFloat = Field(default=0.75, le=1)
    """Share of training after which no feature is resampled, so that the last ones can still be learnt."""
    resample_dead_by: Literal["no_fire", "frequency"] = "no_fire"
    """Which features are dead: those that did not fire in the window, or did on a smaller share of its rows than
    resample_threshold."""
    resample_threshold: PositiveFloat = Field(default=1e-6, lt=1)
    """frequency: share of rows below which a feature is dead."""
    resample_scale: PositiveFloat = 0.2
    """Length of a resampled encoder row, as a share of the living ones' mean."""
    resample_decoder: DecoderFrom = "error"
    """What a resampled feature writes: error (what the transcoder misses of the sampled row's output) or target (the
    centred output itself, as published for autoencoders)."""
    resample_ramp_steps: Quantity = Field(default=500, ge=0)
    """Steps after a resampling over which the learning rate rises linearly from zero to what the schedule says."""

    @property
    def window_steps(self) -> int:
        """Steps counted before a resampling."""
        return max(1, self.resample_every // 2) if self.resample_window is None else self.resample_window

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window_steps > self.resample_every:
            raise ValueError(
                f"resample_window = {self.resample_window} does not fit between resamplings {self.resample_every} "
                "steps apart; lower it or raise resample_every"
            )
        return self

    def needed_rows(self, surroundings: Surroundings) -> RowSource:
        """Return the row source; raise SettingsError where there is none."""
        if surroundings.row_source is None:
            raise SettingsError(
                f"resampling: {getattr(self, 'kind', 'it')} takes new features from training rows, and this run has no "
                "source of rows; train from a cache, or use --auxiliary auxk, which needs none"
            )
        return surroundings.row_source


class Anthropic(PeriodicResampling):
    """Rows drawn by their loss become new features."""

    kind: Literal["anthropic"] = "anthropic"
    resample_by: Literal["loss", "model_loss"] = "loss"
    """What makes a row likely to be drawn: loss (squared, as published) or model_loss (by how much the language model's
    loss rises there with the transcoder in place)."""
    resample_rows: Quantity | None = Field(default=None, ge=1)
    """Rows to draw from; by default 32,768, or 2048 by model_loss, where each costs two passes over its context."""


class L2(PeriodicResampling):
    """Rows drawn by their squared error, with replacement, become new features."""

    kind: Literal["l2"] = "l2"
    resample_rows: Quantity = Field(default=32_768, ge=1)
    """Rows to draw from."""


AnyResampling = Annotated[NoResampling | Anthropic | L2, Field(discriminator="kind")]
"""Settings of any resampling, told apart by ``kind``."""

RESAMPLINGS: tuple[type[Resampling], ...] = get_args(get_args(AnyResampling)[0])
"""Every resampling's settings class."""
