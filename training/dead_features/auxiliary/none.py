"""No auxiliary loss: dead features stay as they are."""

from __future__ import annotations

from typing import Literal

from training.architectures.objectives import Objective
from training.dead_features.auxiliary.term import Auxiliary
from training.dead_features.record import FiringRecord


class NoAuxiliary(Auxiliary):
    """No loss term for dead features."""

    kind: Literal["none"] = "none"

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> None:
        """Return None."""
