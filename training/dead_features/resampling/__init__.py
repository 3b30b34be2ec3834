"""Ways to give dead features new weights: the settings of each, and what resamples."""

from tailrace.training.dead_features.resampling.settings import (
    L2,
    RESAMPLINGS,
    Anthropic,
    AnyResampling,
    NoResampling,
    Resampling,
)

__all__ = ["L2", "RESAMPLINGS", "Anthropic", "AnyResampling", "NoResampling", "Resampling"]
