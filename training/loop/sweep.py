"""Several runs on one stream, with checkpoints they can all be continued from.

A run alone is the case of one. The runs share the stream, so after an interruption they must all go on from the same
step. Checkpoints are therefore written at the same steps by all; each run keeps its two newest, and a run can be ahead
of another by one at most, so a common one survives any interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tailrace.storage.errors import NonFiniteActivation
from tailrace.training.loop.checkpoint import CheckpointClock, Checkpoints
from tailrace.training.loop.distributed import Group
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.session import Session
from tailrace.training.loop.trainer import Duty, Lane, train
from tailrace.training.rows.batches import BatchStream


def newest_common_step(steps: Iterable[Iterable[int]]) -> int | None:
    """Return the newest step of which every run has a checkpoint; None if there is none: all begin anew."""
    sets = [set(of_one_run) for of_one_run in steps]
    return max(set.intersection(*sets), default=None) if sets else None


@dataclass(frozen=True)
class Member:
    """One of several runs, and what is done with it at its end."""

    run: TrainingRun
    session: Session
    checkpoints: Checkpoints
    """The session's."""
    scored_every: Sequence[int]
    """Intervals in steps at which its weights are scored."""
    finish: Callable[[], None]
    give_up: Callable[[NonFiniteActivation], None] | None = None
    """As in ``Lane``."""

    def resume(self, step: int | None) -> Mapping[str, Any] | None:
        """Continue from the checkpoint at ``step``, or begin where it is None; return the stream's state there."""
        # Newer ones, of a run that was ahead, would push out those that it has in common with the others.
        self.checkpoints.discard_after(-1 if step is None else step)
        return self.session.resume(step)

    def lane(self, stream: BatchStream, clock: CheckpointClock) -> Lane:
        """Return the run's place beside the others."""
        # Looking comes first: a weight that is not finite would be scored and, after the last step, published.
        look = Duty(self._is_scored, lambda _: self._refuse_non_finite_weights())
        duties = [look, *self.session.duties(stream, clock)]
        return Lane(self.run, self.session.n_steps, duties, self.finish, self.give_up)

    def _is_scored(self, step: int) -> bool:
        return step == self.session.n_steps or any(step % n == 0 for n in self.scored_every)

    def _refuse_non_finite_weights(self) -> None:
        self.run.state_tensors()


def train_together(
    stream: BatchStream,
    members: Sequence[Member],
    *,
    checkpoint_steps: int,
    watch: Callable[[int], None] | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Train all members to their ends, from the newest step they can all be continued from.

    Their sessions are entered by the caller. A member without a ``give_up`` that fails stops all. ``ready`` is called
    when they stand where they go on from.
    """
    step = newest_common_step(member.session.checkpoint_steps() for member in members)
    states = [member.resume(step) for member in members]
    if states and states[0] is not None:
        stream.load_state_dict(states[0])
    if ready is not None:
        ready()
    clock = CheckpointClock(checkpoint_steps)
    lanes = [member.lane(stream, clock) for member in members]
    train(stream, lanes, first_step=step or 0, watch=watch)


def follow_first(group: Group, run: TrainingRun, stream: BatchStream) -> None:
    """Copy weights, optimiser, firing record and positions of run and stream from the first process to the others.

    To be called by all of them once, before the first step, after the first process has resumed.
    """
    tensors = run.state_tensors() if group.is_first else {}
    found: dict[str, Any] = group.share_first(
        {
            "shapes": {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
            "state": run.state(),
            "steps": run.n_steps_done,
            "rows": run.n_rows_done,
            "stream": stream.state_dict(),
        }
    )
    received = {}
    for name, (shape, dtype) in found["shapes"].items():
        own = tensors[name].detach().to(group.device).clone() if group.is_first else torch.empty(0)
        values = own if group.is_first else torch.empty(shape, dtype=dtype, device=group.device)
        received[name] = group.copy_first(values)
    if not group.is_first:
        run.load_state(received, found["state"], n_steps_done=found["steps"], n_rows_done=found["rows"])
        stream.load_state_dict(found["stream"])
