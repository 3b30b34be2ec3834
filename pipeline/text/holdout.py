"""Which documents are held out. Whole documents, never rows: neighbouring rows of one document would leak."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from tailrace.storage.errors import SettingsError, TextError

FIRST_DOCUMENTS = 16
"""Documents at the start of the stream among which one is surely held out and another one surely trained on."""

MAX_FRACTION = 0.5

_LISTED = re.compile(r"(\d{1,18})|(\d{0,18}):(\d{0,18})(?::(\d{0,18}))?")


class Steps(NamedTuple):
    """Document indices ``start, start + step, …`` below ``stop`` (without end if None)."""

    start: int
    stop: int | None
    step: int

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int) or index < self.start or (self.stop is not None and index >= self.stop):
            return False
        return (index - self.start) % self.step == 0


class FirstChoices(NamedTuple):
    """Two documents whose split is decided at the start of the stream: the one to hold out, the one to train on."""

    held_out: int
    trained: int


@dataclass(frozen=True)
class HoldoutRule:
    """None (``fraction`` 0), by chance (``fraction``), or by a list of document indices (``listed``).

    By chance, document d is a candidate if hash(seed, d) < 2·fraction, and candidates are taken until there are
    enough held-out rows: twice the fraction, because then the rows are complete about half-way through training and
    not, for half of all seeds, only after it. Without a limit of rows the threshold is the fraction itself.
    """

    fraction: float = 0.01
    listed: tuple[Steps, ...] = ()
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> HoldoutRule:
        """Read a share (``0.01``, ``1%``), ``0`` or ``none``, or document indices (``7::20``, ``3,17,40:50``).

        A whole number from 1 on is the index of a document; write ``0:1`` for document 0 alone.
        Raises SettingsError for anything else.
        """
        text = text.strip()
        if text in ("0", "none"):
            return cls(0.0, (), seed)
        if listed := _parse_listed(text):
            return cls(0.0, listed, seed)
        try:
            fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            fraction = math.nan
        if not 0 <= fraction <= MAX_FRACTION:
            raise SettingsError(
                f"holdout: {text!r} is not understood; write a share up to {MAX_FRACTION} such as 0.01, 0 for no "
                "held-out documents, or document indices such as 7::20 or 3,17"
            )
        return cls(fraction, (), seed)

    @property
    def holds_out(self) -> bool:
        """Whether any document is to be held out."""
        return self.fraction > 0 or bool(self.listed)

    def target_rows(self, training_rows: int | None) -> int | None:
        """Return the held-out rows that go with ``training_rows``; None (no limit) for a list or without a limit."""
        if not self.holds_out:
            return 0
        if self.listed or training_rows is None:
            return None
        return max(1, round(self.fraction * training_rows))

    def first_choices(self, indices: Sequence[int]) -> FirstChoices | None:
        """Decide about the first documents of the stream, by smallest and largest hash; None if no chance decides.

        Raises TextError if there are fewer than two documents.
        """
        if not self.fraction:
            return None
        if len(indices) < 2:
            raise TextError(
                "the dataset is a single document, which cannot be both held out and trained on; pass "
                "--holdout 0, or a smaller --text-unit (paragraph or line) if it is a .txt file"
            )
        ordered = sorted(indices, key=self.chance)
        return FirstChoices(ordered[0], ordered[-1])

    def is_candidate(self, index: int, first: FirstChoices | None, *, limited: bool) -> bool:
        """Tell whether document ``index`` is held out as long as rows are wanted; ``limited``: their number is."""
        if self.listed:
            return any(index in steps for steps in self.listed)
        if first is not None and index in first:
            return index == first.held_out
        return self.chance(index) < (2 * self.fraction if limited else self.fraction)

    def chance(self, index: int) -> float:
        """Return the hash of a document, uniform in [0, 1), decided by the seed and its index alone."""
        return xxhash.xxh3_64_intdigest(f"{self.seed}/holdout/{index}".encode()) / 2.0**64


def _parse_listed(text: str) -> tuple[Steps, ...]:
    """Return the listed indices, or nothing if ``text`` is no list (or lists nothing)."""
    parts = [_LISTED.fullmatch(part.strip()) for part in text.strip(",").split(",")]
    steps = []
    for part in parts:
        if part is None or part[4] == "0":
            return ()
        if part[1] is not None:
            steps.append(Steps(int(part[1]), int(part[1]) + 1, 1))
        else:
            steps.append(Steps(int(part[2] or 0), int(part[3]) if part[3] else None, int(part[4] or 1)))
    return tuple(steps)
