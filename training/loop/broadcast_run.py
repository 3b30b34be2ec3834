"""Bring every process of a group to where the first one is: only that one reads and writes checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from tailrace.training.loop.distributed import Group
from tailrace.training.loop.run import TrainingRun
from tailrace.training.rows.batches import BatchStream


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
