"""No auxiliary loss: dead features stay as they are."""

from __future__ import annotations

from typing import Literal

from tailrace.training.architectures.objectives import Objective
from tailrace.training.dead_features.auxiliary.term import Auxiliary
from tailrace.training.dead_features.record import FiringRecord


class NoAuxiliary(Auxiliary):
    """No loss term for dead features."""

    kind: Literal["none"] = "none"

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> None:
        """Return None."""
