"""The training loop: every batch of a stream goes to every run that is still under way.

Each run learns as if it were alone. Runs may end at different steps, and one whose numbers stop being finite, or that
has no row to learn from, may leave without the others. A run alone, a sweep, a transcoder for each layer and a
cross-layer transcoder are all trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tailrace.storage.errors import ActionableError, NonFiniteActivation, NoOrdinaryRows
from tailrace.training.loop.checkpoint import CheckpointClock, CheckpointWriter
from tailrace.training.loop.session import Session, StepCallback
from tailrace.training.rows.batches import BatchStream, SiteBatches

ENDS_A_RUN = (NonFiniteActivation, NoOrdinaryRows)
"""Errors of one run, which would come again if it were continued, and which say nothing of those beside it."""


class LearnsFromBatches(Protocol):
    """What takes optimiser steps."""

    def step(self, batches: SiteBatches) -> None:
        """Learn from one batch of rows at the sites read."""
        ...


@dataclass(frozen=True)
class ScheduledRun:
    """A run beside others: where it ends, and what is done between its steps, at its end, and if it fails."""

    run: LearnsFromBatches
    n_steps: int
    callbacks: Sequence[StepCallback] = ()
    """In order, after each step."""
    finish: Callable[[], None] | None = None
    """Called once, after the last step and its callbacks."""
    give_up: Callable[[ActionableError], None] | None = None
    """Called with an error of ``ENDS_A_RUN``, after which the others go on; None: the error is raised."""

    def advance(self, batches: SiteBatches, step: int) -> bool:
        """Take step number ``step``, counted from 1; return whether there are more to take."""
        try:
            self.run.step(batches)
            for callback in self.callbacks:
                if callback.due(step):
                    callback.action(step)
            if step == self.n_steps and self.finish is not None:
                self.finish()
        except ENDS_A_RUN as error:
            if self.give_up is None:
                raise
            self.give_up(error)
            return False
        return step < self.n_steps


def train(
    stream: BatchStream,
    runs: Sequence[ScheduledRun],
    *,
    first_step: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Give every batch to every run that is still under way; ``first_step`` steps were taken before.

    ``after_step`` gets the number of steps done after each. Raises what the stream raises.
    """
    step = first_step
    under_way = [run for run in runs if run.n_steps > first_step]
    while under_way:
        batches = stream.next_batch()
        step += 1
        under_way = [run for run in under_way if run.advance(batches, step)]
        if after_step is not None:
            after_step(step)


def train_all(
    stream: BatchStream,
    sessions: Sequence[Session],
    *,
    checkpoint_steps: int | None,
    give_up: Callable[[Session, ActionableError], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    before_first_step: Callable[[], None] | None = None,
) -> None:
    """Train all sessions' runs to their ends, from the newest step that all can be continued from.

    The runs share the stream, so after an interruption they must all go on from the same step. Checkpoints are
    therefore written at the same steps by all; each run keeps its two newest, and a run can be ahead of another by one
    at most, so a common one survives any interruption.

    Sessions are entered by the caller. Without ``give_up`` a run that fails stops all. ``before_first_step`` is called
    when all stand where they go on from.
    """
    step = newest_common_step(session.checkpoint_steps() for session in sessions)
    states = [session.resume(step) for session in sessions]
    if states and states[0] is not None:
        stream.load_state_dict(states[0])
    if before_first_step is not None:
        before_first_step()
    clock = CheckpointClock(checkpoint_steps)
    device = sessions[0].run.transcoder.W_enc.device if sessions else torch.device("cpu")
    with CheckpointWriter(device) as writer:
        train(
            stream,
            [_scheduled(session, stream, clock, writer, give_up) for session in sessions],
            first_step=step or 0,
            after_step=after_step,
        )


def _scheduled(
    session: Session,
    stream: BatchStream,
    clock: CheckpointClock,
    writer: CheckpointWriter,
    give_up: Callable[[Session, ActionableError], None] | None,
) -> ScheduledRun:
    return ScheduledRun(
        session.run,
        session.n_steps,
        session.callbacks(stream, clock, writer),
        session.finish,
        None if give_up is None else lambda error: give_up(session, error),
    )


def continued_together(steps: Mapping[str, Iterable[int]]) -> list[list[str]]:
    """Return which runs go on side by side, given the steps that each can be continued from, by name.

    All, if there is a step that they have in common, or none has any; else those whose newest steps agree. They part
    where other processes trained some of them.
    """
    own = {name: set(of_one_run) for name, of_one_run in steps.items()}
    if newest_common_step(own.values()) is not None or not any(own.values()):
        return [[*own]]
    newest: dict[int, list[str]] = {}
    for name, of_one_run in own.items():
        newest.setdefault(max(of_one_run, default=0), []).append(name)
    return [*newest.values()]


def newest_common_step(steps: Iterable[Iterable[int]]) -> int | None:
    """Return the newest step of which every run has a checkpoint; None if there is none: all begin anew."""
    sets = [set(of_one_run) for of_one_run in steps]
    return max(set.intersection(*sets), default=None) if sets else None
