"""The names that settings choose from, where code without settings matches on them too. They need no torch."""

from typing import Literal

NormalisationKind = Literal["standard", "rms", "none"]
ObjectiveKind = Literal["variance", "reference"]
OptimiserKind = Literal["adam", "adamw", "muon"]
KernelKind = Literal["auto", "dense", "sparse", "compiled"]
BiasInit = Literal["mean", "zeros", "geometric_median"]
DecoderInit = Literal["random", "data"]
EncoderInit = Literal["tied", "independent", "kaiming"]
