"""The training loop and nothing else: what happens in a step is a run's affair, what happens between steps a duty's.

Any number of runs learn from one stream, each as if it were alone. They may end at different steps, and one whose
numbers stop being finite may leave without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tailrace.storage.errors import NonFiniteActivation
from tailrace.training.architectures.base import Transcoder
from tailrace.training.rows.batches import BatchStream, SiteBatches


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


@dataclass(frozen=True)
class Lane:
    """A run's place beside others: where it ends, and what is done between its steps, at its end, and if it fails."""

    run: Run
    n_steps: int
    duties: Sequence[Duty] = ()
    """In order, after each step."""
    finish: Callable[[], None] | None = None
    """Done once, after the last step and its duties."""
    give_up: Callable[[NonFiniteActivation], None] | None = None
    """Told when loss or weights stop being finite, after which the others go on; None: the error is raised."""

    def advance(self, batches: SiteBatches, step: int) -> bool:
        """Take step number ``step``, counted from 1; return whether there are more to take."""
        try:
            self.run.step(batches)
            for duty in self.duties:
                if duty.due(step):
                    duty.action(step)
            if step == self.n_steps and self.finish is not None:
                self.finish()
        except NonFiniteActivation as error:
            if self.give_up is None:
                raise
            self.give_up(error)
            return False
        return step < self.n_steps


def train(
    stream: BatchStream, lanes: Sequence[Lane], *, first_step: int = 0, watch: Callable[[int], None] | None = None
) -> None:
    """Give every batch to every run that is still under way; ``first_step`` steps were taken before.

    ``watch`` is told the number of steps done after each. Raises what the stream raises, whatever the lanes.
    """
    step = first_step
    under_way = [lane for lane in lanes if lane.n_steps > first_step]
    while under_way:
        batches = stream.next_batch()
        step += 1
        under_way = [lane for lane in under_way if lane.advance(batches, step)]
        if watch is not None:
            watch(step)
