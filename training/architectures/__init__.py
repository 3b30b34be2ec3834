"""The architectures: the settings of each, and how its features are chosen and held sparse."""

from tailrace.training.architectures.settings import (
    ARCHITECTURES,
    AnyArchitecture,
    Architecture,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
)

__all__ = [
    "ARCHITECTURES",
    "AnyArchitecture",
    "Architecture",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "TopK",
]
