"""When checkpoints are written: after so many steps, or once the last ones are old for what they cost.

What is written when changes no result: a run continued from any checkpoint ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CHECKPOINT_SECONDS = 60.0
"""Age at which checkpoints that are cheap are followed by new ones, for runs whose steps take long."""
LARGEST_SHARE = 0.05
"""Of the time, that goes into checkpoints written for their age. Thirty runs side by side on a busy disk can take
minutes for a round of them: once a minute they would never come to train."""


class CheckpointClock:
    """Tells all runs of one stream after which steps to write a checkpoint, the same to each.

    One is due every ``every_steps``, whatever it costs, and when the last round is ``CHECKPOINT_SECONDS`` old and so
    old that writing it took at most ``LARGEST_SHARE`` of the time since it began. ``now`` gives seconds that only rise.
    """

    def __init__(self, every_steps: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._every_steps, self._now = every_steps, now
        self._began = now()
        """When the last round of checkpoints began; the training itself, before there is one."""
        self._took = 0.0
        """Seconds that its runs took to write it."""
        self._step = -1
        self._is_due = False

    def is_due(self, step: int) -> bool:
        """Return whether runs write a checkpoint after ``step``; the time is looked at once per step."""
        if step != self._step:
            self._step = step
            now = self._now()
            wait = max(CHECKPOINT_SECONDS, self._took / LARGEST_SHARE)
            self._is_due = step % self._every_steps == 0 or now - self._began >= wait
            if self._is_due:
                self._began, self._took = now, 0.0
        return self._is_due

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time inside as spent on one run's checkpoint of the round that is due."""
        start = self._now()
        yield
        self._took += self._now() - start
