"""No resampling: a feature keeps the weights it has."""

from __future__ import annotations

from typing import Literal

from tailrace.training.dead_features.resampling.settings import Resampling


class NoResampling(Resampling):
    """No resampling."""

    kind: Literal["none"] = "none"
