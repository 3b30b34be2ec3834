"""The list of ways to give dead features new weights. To add one: a file beside this, and its name below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from tailrace.training.dead_features.resampling.anthropic import Anthropic
from tailrace.training.dead_features.resampling.l2 import L2
from tailrace.training.dead_features.resampling.none import NoResampling
from tailrace.training.dead_features.resampling.settings import Resampling

__all__ = ["L2", "RESAMPLINGS", "Anthropic", "AnyResampling", "NoResampling", "Resampling"]

AnyResampling = Annotated[NoResampling | Anthropic | L2, Field(discriminator="kind")]
"""Settings of any resampling, told apart by ``kind``."""

RESAMPLINGS: tuple[type[Resampling], ...] = get_args(get_args(AnyResampling)[0])
"""Every resampling's settings class."""
