"""The learning rate as a pure function of the step: nothing to save, nothing to get out of step with the optimiser.

Step s counts from 0 and ``factor(s)`` is what the optimiser uses *in* step s. (The original code advanced its
scheduler first, so that its warm-up began at 2/W.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then constant, then linear to zero at ``n_steps``.

    No warm-up or no decay if their length is 0. With ``decay_steps = n_steps − warmup_steps`` this is the original
    code's linear warm-up and decay.
    """

    n_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0

    def factor(self, step: int) -> float:
        """Return what the base learning rate is multiplied by in ``step``: between 0 and 1."""
        rising = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        falling = (self.n_steps - step) / self.decay_steps if self.decay_steps else 1.0
        return max(0.0, min(1.0, rising, falling))
