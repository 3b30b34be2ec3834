"""Every decision that changes the transcoder a run makes. Devices, threads and paths are arguments of the stage.

Nothing here, nor what it imports, needs torch: ``pipeline train --help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tailrace.storage.names import home_path
from tailrace.storage.settings import Quantity, Settings
from tailrace.training.architectures import AnyArchitecture, BatchTopK
from tailrace.training.architectures.schedule import Schedule, ScheduleKind
from tailrace.training.choices import (
    BiasInit,
    DecoderInit,
    EncoderInit,
    KernelKind,
    NormalisationKind,
    ObjectiveKind,
    OptimiserKind,
)
from tailrace.training.dead_features.auxiliary import AnyAuxiliary, NoAuxiliary
from tailrace.training.dead_features.resampling import AnyResampling, NoResampling


class NoConnection(Settings):
    """No penalty on connections."""

    kind: Literal["none"] = "none"


class SparseConnection(Settings):
    """Sparse connections to another transcoder."""

    kind: Literal["sparse"] = "sparse"
    connection_path: Annotated[Path, AfterValidator(home_path)]
    """Published transcoder, or .safetensors file with its W_enc and W_dec (one row per feature), to connect sparsely
    to."""
    connection_coefficient: NonNegativeFloat
    """Weight of the mean over its features of the summed absolute products with decoder rows."""
    connection_matrix: Literal["encoder", "decoder"] = "encoder"
    """Whether connections are to what its features read (encoder) or write (decoder)."""


AnyConnection = Annotated[NoConnection | SparseConnection, Field(discriminator="kind")]
"""Settings of the sparse-connection loss, told apart by ``kind``."""


class Intervals(NamedTuple):
    """How often a run is logged and scored, in steps."""

    log_every: int
    evaluate_every: int
    evaluation_rows: int
    """Held-out rows of a score before the end."""


class TrainSettings(Settings):
    """Settings of ``pipeline train``."""

    help_sections: ClassVar = {
        "site": "What to learn",
        "epochs": "How long",
        "lr": "Optimiser",
        "normalisation": "Rows and loss",
        "bias_init": "First weights",
        "auxiliary": "Dead features",
        "connection": "Connections",
        "kernel": "Speed",
        "log_every": "Logging and scoring",
        "dead_after_steps": "Dead features",
        "keep_best": "Logging and scoring",
        "seed": "Random numbers",
    }
    help_basics: ClassVar = (
        *("site", "architecture", "k", "expansion", "d_sae"),
        *("epochs", "rows", "batch_rows", "lr", "auxiliary"),
    )

    site: str | None = None
    """Site of the cache to train on, e.g. layer8; may be left out if the cache has only one."""

    cross_layer: bool = False
    """One transcoder over all layers of the cache (or those that site names, such as layer3-8 or layer3,layer5): a
    feature reads one layer and writes to it and every later one. Sizes are a layer's: d_sae, expansion, and k and
    target_l0, means per layer."""
    architecture: AnyArchitecture = BatchTopK()
    """Kind of transcoder and its own settings."""
    expansion: PositiveInt = 32
    """Number of features as a multiple of d_in."""
    d_sae: Quantity | None = Field(default=None, ge=1)
    """Number of features; used instead of expansion."""

    epochs: PositiveFloat | None = None
    """Passes over the training rows; 1 unless steps, rows or this is given."""
    rows: Quantity | None = Field(default=None, ge=1)
    """Length of training in rows, e.g. 60M; more than the cache holds means further epochs."""
    steps: Quantity | None = Field(default=None, ge=1)
    """Length of training in optimiser steps."""
    batch_rows: Quantity = Field(default=4096, ge=1)
    """Rows per optimiser step."""

    lr: PositiveFloat = 4e-3
    """Learning rate of Adam once warm-up is over, on normalised activations."""
    schedule: ScheduleKind = "linear"
    """Course of the learning rate after warm-up: linear (constant, then to zero over decay_steps), constant, cosine,
    cosine_restarts."""
    warmup_steps: Quantity | None = Field(default=None, ge=0)
    """Steps over which the learning rate rises linearly; by default a twentieth of all, at most 1000."""
    decay_steps: Quantity | None = Field(default=None, ge=0)
    """linear: steps at the end over which it falls to zero; by default a fifth of all. 0 keeps it constant."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """cosine, cosine_restarts: share of lr that is left at the end."""
    cycles: PositiveInt = 1
    """cosine_restarts: number of times it starts anew from lr."""
    optimiser: OptimiserKind = "adam"
    """adam, adamw (weight decay 0.01) or muon (for the two weight matrices, adam for the rest)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Score and publish a moving average of the weights, which count this much less with every step, such as 0.999."""
    gradient_clip: PositiveFloat | None = None
    """Largest norm of the whole gradient; not clipped by default."""

    normalisation: NormalisationKind = "standard"
    """What brings activations to one scale: standard (centre, divide by RMS), rms (divide only) or none."""
    reconstruction: ObjectiveKind = "variance"
    """Loss: squared error over the outputs' variance, or the reference's squared error over each row's norm."""
    max_norm_multiple: float | None = Field(default=None, gt=1, le=1e9)
    """Leave out rows whose input or output is longer than this many times the median, such as 10: in layers with
    massive activations a few rows otherwise decide everything. By default all rows are learnt from."""
    bias_init: BiasInit = "mean"
    """What the output bias (and the input bias, if there is one) begins as: mean, zeros or geometric_median."""
    bias_init_rows: Quantity = Field(default=65_536, ge=1)
    """Rows, a uniform sample, whose geometric median is taken."""
    decoder_init: DecoderInit = "random"
    """What features write at the start: random directions, or (data) the centred outputs of random rows."""
    encoder_init: EncoderInit = "tied"
    """What features read at the start: tied (what they write, if inputs and outputs have one width, else independent),
    independent (random directions) or kaiming (the original code's, each weight uniform within √(6 / d_sae))."""
    encoder_scale: PositiveFloat = 0.1
    """Length of the encoder's rows at the start; at 1, random features would first have to be unlearnt. For kaiming, a
    factor on its weights, 1 being the original code's."""

    auxiliary: AnyAuxiliary = NoAuxiliary()
    """Loss term that revives dead features: none, auxk (they reconstruct the residual) or ghost (ghost gradients)."""
    resampling: AnyResampling = NoResampling()
    """How dead features get new weights: none, anthropic (from rows drawn by their loss) or l2 (with replacement)."""
    connection: AnyConnection = NoConnection()
    """Penalty on connections to another transcoder's features: none or sparse."""
    kernel: KernelKind = "auto"
    """How a step is computed: auto (sparse while few features fire, else dense; on a GPU only if the sparse step proves
    right and faster on the first batches), dense, sparse, or compiled (dense through torch.compile)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto is bfloat16 where the device has instructions for it."""

    log_every: Quantity | None = Field(default=None, ge=1)
    """Steps between lines of training losses in metrics.jsonl; by default a thirtieth of all, at most 50."""
    evaluate_every: Quantity | None = Field(default=None, ge=1)
    """Steps between scores on held-out rows; by default a tenth of all, at most 1000. There is always one at the end,
    over all of them."""
    evaluation_rows: Quantity = Field(default=65_536, ge=1)
    """Held-out rows used before the end, at most. Where evaluate_every is not given they are a 1000th of the rows
    trained on, at least 1024: all scores together cost little."""
    dead_after_steps: Quantity = Field(default=1000, ge=1)
    """Steps without firing after which a feature counts as dead, for the training log and for auxiliary."""
    feature_sampling_window: Quantity = Field(default=2000, ge=1)
    """Steps over which it is counted how often each feature fires."""
    dead_feature_threshold: float = Field(default=1e-8, ge=0, le=1)
    """Frequency in that window below which sparsity/dead_features counts a feature."""
    keep_best: bool = False
    """Keep the weights that had the lowest FVU on the same evaluation_rows held-out rows, as best.safetensors."""
    snapshots: Quantity = Field(default=0, ge=0)
    """Evenly spaced copies of the transcoder kept from the way to the end."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights and whatever else is drawn while training."""
    order_seed: int = Field(default=0, ge=0)
    """Decides the order of rows; runs that share it share one reading of the cache."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        lengths = [name for name in ("epochs", "rows", "steps") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} all set the length of training; give one of them")
        if self.d_sae is not None and "expansion" in self.model_fields_set:
            raise ValueError("expansion and d_sae both set the number of features; give one of them")
        return self

    def initial_rows(self, d_in: int) -> int:
        """Return how many rows the first weights are made from, for inputs of width ``d_in``."""
        for_biases = self.bias_init_rows if self.bias_init == "geometric_median" else 0
        for_decoder = self.n_features(d_in) if self.decoder_init == "data" else 0
        return max(for_biases, for_decoder)

    def n_features(self, d_in: int) -> int:
        """Return d_sae for inputs of width ``d_in``."""
        return self.d_sae if self.d_sae is not None else self.expansion * d_in

    def n_steps(self, n_rows: int, n_steps_per_epoch: int) -> int:
        """Return the number of optimiser steps on a split of ``n_rows`` rows: the first that reaches the length."""
        if self.steps is not None:
            return self.steps
        if self.rows is not None:
            return -(-self.rows // min(self.batch_rows, n_rows))
        return max(1, round((self.epochs or 1) * n_steps_per_epoch))

    def intervals(self, n_steps: int) -> Intervals:
        """Return how often a run of ``n_steps`` is logged and scored."""
        affordable = max(1024, n_steps * self.batch_rows // 1000)
        return Intervals(
            self.log_every or min(50, max(1, n_steps // 30)),
            self.evaluate_every or min(1000, max(1, n_steps // 10)),
            min(self.evaluation_rows, affordable) if self.evaluate_every is None else self.evaluation_rows,
        )

    def build_schedule(self, n_steps: int) -> Schedule:
        """Return the learning-rate schedule of a run of ``n_steps``."""
        warmup = min(1000, n_steps // 20) if self.warmup_steps is None else self.warmup_steps
        decay = n_steps // 5 if self.decay_steps is None else self.decay_steps
        return Schedule(n_steps, warmup, decay, self.schedule, self.final_lr, self.cycles)

    def without_effect(self, n_steps: int) -> list[str]:
        """Return a sentence for every setting that a run of ``n_steps`` never comes to, or that another rules out."""
        given, sentences = self.model_fields_set, []
        if self.warmup_steps is not None and self.warmup_steps >= n_steps:
            sentences.append(
                f"warmup_steps {self.warmup_steps} is as long as the run of {n_steps} steps: "
                f"lr {self.lr} is never reached"
            )
        for name, kinds in (
            ("decay_steps", ("linear",)),
            ("final_lr", ("cosine", "cosine_restarts")),
            ("cycles", ("cosine_restarts",)),
        ):
            if name in given and self.schedule not in kinds:
                sentences.append(f"{name} belongs to schedule {' or '.join(kinds)}; schedule is {self.schedule}")
        if not isinstance(self.auxiliary, NoAuxiliary) and self.dead_after_steps >= n_steps:
            sentences.append(
                f"dead_after_steps {self.dead_after_steps} is as long as the run of {n_steps} steps: no feature is "
                f"ever called dead, and auxiliary {self.auxiliary.kind} has nothing to do"
            )
        for name in ("k_warmup_steps", "l1_warmup_steps", "l0_warmup_steps"):
            length = getattr(self.architecture, name, 0)
            if name in self.architecture.model_fields_set and length >= n_steps:
                sentences.append(
                    f"{name} {length} is as long as the run of {n_steps} steps: the end of it is never reached"
                )
        return sentences
