"""The settings of ``pipeline task``."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from tailrace.storage.settings import Settings


class TaskSettings(Settings):
    """What to measure."""

    kept: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Numbers of features, and of neurons, to keep, such as 0-16,32,64. May be repeated; each number is a run of all
    prompts."""
    leave_out: int = Field(default=16, ge=0)
    """Leave out each of this many features of the highest variance."""
    prompts_per_batch: int = Field(default=64, gt=0)
    """Prompts per pass of the language model."""

    @field_validator("kept", mode="before")
    @classmethod
    def _read_ranges(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(number for item in items for number in (_numbers(item) if isinstance(item, str) else [item]))

    @field_validator("kept")
    @classmethod
    def _check_kept(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 0 for count in value):
            raise ValueError("wanted numbers of features, none below 0")
        return tuple(sorted(set(value)))


def _numbers(text: str) -> list[int]:
    """Return the numbers of ``0-16,32``; both ends belong to a range."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{part!r} is no number and no range; write numbers and ranges such as 0-16,32,64")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
