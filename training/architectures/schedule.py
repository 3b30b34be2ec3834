"""The learning rate as a pure function of the step: nothing to save, nothing to get out of step with the optimiser.

Step s counts from 0 and ``factor(s)`` is what the optimiser uses *in* step s. (The original code advanced its
scheduler first, so that its warm-up began at 2/W.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, assert_never

ScheduleKind = Literal["constant", "linear", "cosine", "cosine_restarts"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over ``warmup_steps``, then one of four courses over the rest of ``n_steps``.

    ``constant`` stays at 1. ``linear`` stays at 1 and falls linearly to zero over the last ``decay_steps``. ``cosine``
    falls from 1 to ``final`` in half a cosine; ``cosine_restarts`` does so ``n_cycles`` times (Loshchilov & Hutter
    2017). The original code's six are: constant; constant with warm-up; linear with decay_steps = n_steps −
    warmup_steps; cosine without and with warm-up; cosine_restarts. Its floor lr_end is ``final`` · lr in all of them.
    """

    n_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    kind: ScheduleKind = "linear"
    final: float = 0.0
    n_cycles: int = 1

    def factor(self, step: int) -> float:
        """Return what the base learning rate is multiplied by in ``step``: between 0 and 1."""
        return min(warmed_up(step, self.warmup_steps), self._course(step))

    def _course(self, step: int) -> float:
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                left = (self.n_steps - step) / self.decay_steps if self.decay_steps else 1.0
                return max(0.0, min(1.0, left))
            case "cosine":
                return self._cosine(max(0, step - self.warmup_steps) / max(1, self.n_steps - self.warmup_steps))
            case "cosine_restarts":
                length = max(1, (self.n_steps - self.warmup_steps) // self.n_cycles)
                return self._cosine(max(0, step - self.warmup_steps) % length / length)
            case _:
                assert_never(self.kind)

    def _cosine(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def warmed_up(step: int, warmup_steps: int) -> float:
    """Return the share of a value in ``step`` that rises linearly over ``warmup_steps`` and is whole in the last."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
