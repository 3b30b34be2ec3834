"""The settings of ``pipeline blind draw``, and how a blind study may end."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from tailrace.storage.settings import Settings

Outcome = Literal["right", "partly right", "wrong"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class DrawSettings(Settings):
    """Which features, and how many."""

    n: int = Field(default=50, ge=1)
    """Features of each dictionary."""

    seed: int = Field(default=0, ge=0)
    """Decides which are drawn and in what order they are shown."""

    min_log10_frequency: float = -4.0
    """A feature may be drawn if log10 of its frequency is above this."""

    min_active: int = Field(default=4, ge=1)
    """A feature that fires on fewer rows is replaced by a new random one, at its own place."""

    window: int = Field(default=16, ge=0, lt=2**31)
    """Tokens shown on each side of an example, if the tables hold as many."""
