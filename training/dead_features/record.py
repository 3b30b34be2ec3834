"""Which features have gone quiet while training.

This counts optimiser steps, on batches that differ; the share of dead features that runs are compared by is the
held-out one (``tailrace.training.loop.evaluate``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FiringRecord:
    """Steps since each feature last fired; 0 for those that fired in the latest batch."""

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.steps_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, n_active: Tensor) -> None:
        """Count one step in which feature f fired on ``n_active[f]`` rows."""
        self.steps_since_fired += 1
        self.steps_since_fired.masked_fill_(n_active > 0, 0)

    def restart(self, features: Tensor) -> None:
        """Count features (n,), by index, as having fired just now: they have new weights."""
        self.steps_since_fired[features] = 0

    def dead(self, after_steps: int) -> Tensor:
        """Return which features (d_sae,) have not fired in the last ``after_steps`` steps."""
        return self.steps_since_fired >= after_steps

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the record by name."""
        return {"steps_since_fired": self.steps_since_fired}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``state_tensors``."""
        self.steps_since_fired.copy_(tensors["steps_since_fired"])
