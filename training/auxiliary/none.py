"""No auxiliary loss: dead features stay as they are."""

from __future__ import annotations

from typing import Literal

from training.auxiliary.term import Auxiliary
from training.dead_features import FiringRecord
from training.objectives import Objective


class NoAuxiliary(Auxiliary):
    """No loss term for dead features."""

    kind: Literal["none"] = "none"

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> None:
        """Return None."""
