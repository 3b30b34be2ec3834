"""The settings of ``pipeline task``."""

from __future__ import annotations

from pydantic import Field, field_validator

from tailrace.storage.settings import Settings


class TaskSettings(Settings):
    """What to measure."""

    kept: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Numbers of features, and of neurons, to keep. May be repeated; each is a run of all prompts."""
    leave_out: int = Field(default=16, ge=0)
    """Leave out each of this many features of the highest variance."""
    prompts_per_batch: int = Field(default=64, gt=0)
    """Prompts per pass of the language model."""

    @field_validator("kept")
    @classmethod
    def _check_kept(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 0 for count in value):
            raise ValueError("wanted numbers of features, none below 0")
        return tuple(sorted(set(value)))
