"""Loss terms that keep features alive: the settings of each, and the loss."""

from tailrace.training.dead_features.auxiliary.settings import (
    AUXILIARIES,
    AnyAuxiliary,
    Auxiliary,
    AuxK,
    Ghost,
    NoAuxiliary,
)

__all__ = ["AUXILIARIES", "AnyAuxiliary", "AuxK", "Auxiliary", "Ghost", "NoAuxiliary"]
