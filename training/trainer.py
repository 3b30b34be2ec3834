"""The training loop and nothing else: what happens in a step is a run's affair, what happens between steps a duty's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from training.architectures.base import Transcoder
from training.batches import BatchStream, SiteBatches


class Run(Protocol):
    """Something that learns from batches."""

    def step(self, batches: SiteBatches) -> None:
        """Learn from one batch of rows at the sites read."""
        ...


class PeriodicHook(Protocol):
    """What the caller wants done now and then, such as measuring the language model with the transcoder in place."""

    def __call__(self, step: int, transcoder: Transcoder, /) -> Mapping[str, float] | None:
        """Look at ``transcoder``, a folded copy as it would be published after ``step`` steps; return what to log."""
        ...


@dataclass(frozen=True)
class Duty:
    """An action after the steps for which ``due`` holds; it gets the number of steps done."""

    due: Callable[[int], bool]
    action: Callable[[int], None]


def every(n: int, last: int | None = None) -> Callable[[int], bool]:
    """Return a rule that holds after every ``n``-th step, and after step ``last``."""
    return lambda step: step % n == 0 or step == last


def train(
    stream: BatchStream, runs: Sequence[Run], duties: Sequence[Duty], *, n_steps: int, first_step: int = 0
) -> None:
    """Give every batch to every run, from ``first_step`` to ``n_steps``; see to ``duties``, in order, after each."""
    for step in range(first_step, n_steps):
        batch = stream.next_batch()
        for run in runs:
            run.step(batch)
        for duty in duties:
            if duty.due(step + 1):
                duty.action(step + 1)
