"""One transcoder trained by several processes, each on a slice of the rows of every batch; the numbers of one process.

The first process reads the rows and sends each its slice. Every process has all the weights and takes the same step:
gradients are added up, weighted by rows, before the optimiser sees them. What is not a mean over rows is asked of
``SharedBatch``. The first process writes the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.kernel import ExtraLoss, PerRow, StatefulKernel, StepKernel, StepResult
from tailrace.training.loop.run import TrainingRun
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions, Cut
from tailrace.training.rows.batches import Batch, BatchStream, SiteBatches

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, one of which may be scoring held-out rows."""


class Group:
    """The processes that train together, as torch's default process group. A context manager, which leaves it."""

    def __init__(self, rank: int, size: int, device: torch.device, *, shards_features: bool = False) -> None:
        self.rank = rank
        """From 0."""
        self.size = size
        self.device = device
        """Where this process computes, and what it sends comes from."""
        self.shards_features = shards_features
        """Whether the processes share the features, and each sees all rows, instead of the rows."""
        self._host = dist.new_group(backend="gloo") if device.type == "cuda" else None
        """For what lies on the host."""

    def _channel(self, values: Tensor) -> dist.ProcessGroup | None:
        return self._host if values.device.type == "cpu" else None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their sum over all processes, bit for bit the same in each; return them."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self._channel(values))
        return values

    def least(self, values: Tensor) -> Tensor:
        """Replace ``values`` by the smallest of all processes; return them."""
        dist.all_reduce(values, dist.ReduceOp.MIN, group=self._channel(values))
        return values

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Return the ``rows`` (n, …) of every process in order; n may differ, the rest may not."""
        length = torch.tensor([len(rows)], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        sizes = [int(size) for size in lengths]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]

    def gather_alike(self, values: Tensor) -> list[Tensor]:
        """Return the ``values`` of every process in order; all have the same shape."""
        pieces = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(pieces, values.contiguous(), group=self._channel(values))
        return pieces

    def gather_first(self, values: Tensor) -> list[Tensor]:
        """Return, in the first process, the same; nothing in the others."""
        pieces = [torch.empty_like(values) for _ in range(self.size)] if self.is_first else None
        dist.gather(values.contiguous(), pieces, dst=0, group=self._channel(values))
        return pieces or []

    def copy_first(self, values: Tensor) -> Tensor:
        """Replace ``values`` by those of the first process; return them."""
        dist.broadcast(values, src=0, group=self._channel(values))
        return values

    def share_first(self, value: Any) -> Any:
        """Return the first process's ``value``, which must be picklable; those of the others do not count."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host, device=torch.device("cpu"))
        return box[0]

    def send(self, values: Tensor, rank: int) -> None:
        """Send ``values`` to a process, which is about to ``receive`` as many from the first."""
        dist.send(values.contiguous(), rank, group=self._channel(values))

    def receive(self, values: Tensor) -> Tensor:
        """Replace ``values`` by those that the first process sends; return them."""
        dist.recv(values, 0, group=self._channel(values))
        return values

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.add_up(torch.zeros(1))

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_group(
    device: torch.device | str = "cpu",
    *,
    shards_features: bool = False,
    meeting: str = "env://",
    environment: Mapping[str, str] = os.environ,
) -> Group | None:
    """Join the group that the variables set by torchrun describe; None where there are none, or is one process.

    On CUDA a process takes the device of its LOCAL_RANK and the backend is NCCL, else it is gloo. ``meeting`` says
    where processes find each other (``init_method`` of torch). ``shards_features`` says what they share. Raises
    SettingsError naming every variable that is missing or wrong.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    rank, size, local = _read_environment(environment, with_address=meeting == "env://")
    if size == 1:
        return None
    on = torch.device(device)
    if on.type == "cuda":
        on = torch.device("cuda", local)
        torch.cuda.set_device(on)
    backend = "nccl" if on.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=TIMEOUT)
    return Group(rank, size, on, shards_features=shards_features)


def device_of_process(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the device of this process by name: cuda is that of its LOCAL_RANK where torchrun started several.

    For use before anything is put on a device: whatever opens cuda without a number takes memory on the first GPU.
    Raises SettingsError where there are fewer GPUs than processes.
    """
    local = environment.get("LOCAL_RANK", "")
    if name != "cuda" or "RANK" not in environment or not local.isdecimal():
        return name
    n_processes, n_gpus = environment.get("LOCAL_WORLD_SIZE", ""), torch.cuda.device_count()
    needed = max(int(local) + 1, int(n_processes) if n_processes.isdecimal() else 0)
    if 0 < n_gpus < needed:
        raise SettingsError(
            f"--device {name}: torchrun started {needed} processes on this machine, which has a GPU each for {n_gpus}; "
            f"start it with --nproc-per-node {n_gpus}"
        )
    return f"cuda:{local}"


def _read_environment(environment: Mapping[str, str], *, with_address: bool) -> tuple[int, int, int]:
    wanted = ["RANK", "WORLD_SIZE", *(["MASTER_ADDR", "MASTER_PORT"] if with_address else [])]
    problems = [f"{name} is not set" for name in wanted if name not in environment]
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name, "0")
        if text.isdecimal():
            numbers[name] = int(text)
        else:
            problems.append(f"{name} is {text!r}, not a number from 0")
    if not problems and numbers["RANK"] >= numbers["WORLD_SIZE"]:
        problems.append(f"RANK is {numbers['RANK']}, but WORLD_SIZE is {numbers['WORLD_SIZE']}")
    if problems:
        raise SettingsError(
            f"these environment variables do not describe a group of processes: {'; '.join(problems)}. "
            "Start the command with torchrun, or unset RANK and WORLD_SIZE to train in one process"
        )
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]


Layout = dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...] | None]]
"""Type and shapes of inputs and outputs of a batch by site; None for outputs that are the inputs."""


def layout_of(batches: SiteBatches) -> Layout:
    """Return what a process has to know of batches before it is sent them."""
    return {
        site: (
            rows.inputs.dtype,
            tuple(rows.inputs.shape),
            None if rows.outputs is rows.inputs else tuple(rows.outputs.shape),
        )
        for site, rows in batches.items()
    }


class SharedRows:
    """This process's rows of every batch that the first process reads; the ``stream`` of the others is not read.

    Slices are consecutive and differ by at most one row. States are the stream's.
    """

    def __init__(self, stream: BatchStream, group: Group) -> None:
        self._stream, self._group = stream, group

    def next_batch(self) -> dict[str, Batch]:
        """Return the next batch's slice by site. Raises SettingsError if there is no row for every process."""
        batches = self._stream.next_batch() if self._group.is_first else {}
        layout: Layout = self._group.share_first(layout_of(batches))
        shared = {}
        for site, (dtype, *shapes) in layout.items():
            given = batches[site] if self._group.is_first else (None, None)
            sides = [
                self._share(rows, shape, dtype) for rows, shape in zip(given, shapes, strict=True) if shape is not None
            ]
            shared[site] = Batch(sides[0], sides[-1])
        return shared

    def _share(self, rows: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the own slice of the first process's ``rows``, which have that ``shape``."""
        group = self._group
        slices = [rows_of_rank(shape[0], rank, group.size) for rank in range(group.size)]
        if rows is None:
            own = slices[group.rank]
            return group.receive(torch.empty(own.stop - own.start, *shape[1:], dtype=dtype, device=group.device))
        for rank in range(1, group.size):
            group.send(rows[slices[rank]], rank)
        return rows[slices[0]]

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position, in the first process."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position, where the stream is read."""
        if self._group.is_first:
            self._stream.load_state_dict(state)


def rows_of_rank(n: int, rank: int, size: int) -> slice:
    """Return a process's rows of a batch of ``n``. Raises SettingsError if there is no row for every process."""
    if n < size:
        raise SettingsError(
            f"batch_rows: a batch of {n} rows cannot be shared by {size} processes; "
            "raise batch_rows, or start fewer processes"
        )
    return slice(n * rank // size, n * (rank + 1) // size)


class SharedBatch(BatchReductions):
    """A batch whose rows lie in the processes of a group. Every method must be called by all of them, in one order."""

    def __init__(self, group: Group, own_rows: int, n_rows: int) -> None:
        self._group, self._n_rows = group, n_rows
        self.share = own_rows / n_rows
        """The part of the rows that is at hand."""

    def n_rows(self, own: int) -> int:  # noqa: ARG002
        """Return the number of rows of all processes."""
        return self._n_rows

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return self._group.add_up(counts.clone())

    def of_earlier(self, counts: Tensor) -> Tensor:
        """Return the sum over the processes before this one."""
        return torch.stack([torch.zeros_like(counts), *self._group.gather_alike(counts)[: self._group.rank]]).sum(
            0, dtype=counts.dtype
        )

    def mean(self, own: Tensor) -> Tensor:
        """Return the mean over all rows, summed in float64; its gradient is that of ``own``."""
        whole = self._group.add_up(own.detach().double() * self.share).to(own.dtype)
        return own - own.detach() + whole

    def least(self, own: Tensor) -> Tensor:
        """Return the smallest of all processes."""
        return self._group.least(own.clone())

    def share_of_largest(self, values: Tensor, n: int) -> int:
        """Return how many of the ``n`` largest positive values of all processes are among ``values``."""
        while not (cut := self.cut(values, 0.0, n)).is_complete:
            pass  # another process has to come with more candidates
        return cut.n_own

    def cut(self, candidates: Tensor, certain: float, n: int) -> Cut:
        """Return where the ``n`` largest of all processes end. All get the same threshold and the same completeness.

        Of values equal to the threshold, those of the first processes count.
        """
        own = candidates.detach()
        if len(own) > n:
            own = own.topk(n, sorted=False).values
        own = own[own > 0]
        if own.dtype in (torch.bfloat16, torch.float16):
            own = own.float()  # exact, and what a process whose kernel is exact sends
        floor = -float(self._group.least(torch.tensor([-certain], dtype=torch.float64, device=self._group.device)))
        pieces = self._group.gather(own.to(self._group.device))
        everything = torch.cat(pieces)
        threshold = float(everything.topk(n, sorted=False).values.min()) if len(everything) >= n else 0.0
        left = n - int((everything > threshold).sum())
        for piece in pieces[: self._group.rank]:
            left -= int((piece == threshold).sum())
        n_equal = int((own == threshold).sum())
        return Cut(threshold, int((own > threshold).sum()) + min(n_equal, max(0, left)), threshold >= floor)


class DistributedStep:
    """A kernel on this process's rows, whose gradients, losses and counts are made those of the whole batch."""

    def __init__(self, kernel: StepKernel, group: Group) -> None:
        self._kernel, self._group = kernel, group

    def __call__(
        self,
        transcoder: Transcoder,
        batch: Batch,
        objective: Objective,
        extra: Sequence[ExtraLoss] = (),
        *,
        per_row: bool = False,
        reductions: BatchReductions = ALONE,
    ) -> StepResult:
        """Set ``.grad`` of every parameter and return the loss terms; ``outputs`` are those of the rows at hand.

        ``per_row`` is done if any process asks for it: the one that keeps the log is.
        """
        assert reductions is ALONE, "a slice is not sliced again"
        # on the host, as below: what lies on a GPU is there only once all steps before are done
        n_rows, n_asking = self._group.add_up(torch.tensor([len(batch.inputs), int(per_row)])).tolist()
        shared = SharedBatch(self._group, len(batch.inputs), n_rows)
        result = self._kernel(transcoder, batch, objective, extra, per_row=n_asking > 0, reductions=shared)
        self._add_up_gradients(transcoder, shared.share)
        values = torch.stack([value.double() for value in result.losses.values()]) * shared.share
        kinds = [value.dtype for value in result.losses.values()]
        summed = self._group.add_up(values)
        losses = {name: one.to(kind) for name, one, kind in zip(result.losses, summed, kinds, strict=True)}
        rows = None if result.per_row is None else PerRow(*(torch.cat(self._group.gather(x)) for x in result.per_row))
        return result._replace(losses=losses, per_row=rows)

    def _add_up_gradients(self, transcoder: Transcoder, share: float) -> None:
        parameters = list(transcoder.parameters())
        have = torch.tensor([int(parameter.grad is not None) for parameter in parameters])
        for parameter, has_any in zip(parameters, self._group.add_up(have).tolist(), strict=True):
            if not has_any:
                continue
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = self._group.add_up(own.mul_(share))

    def state(self) -> dict[str, Any] | None:
        """Return the inner kernel's state, which is the same in every process."""
        return self._kernel.state() if isinstance(self._kernel, StatefulKernel) else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from ``state``."""
        if isinstance(self._kernel, StatefulKernel):
            self._kernel.load_state(state)


def broadcast_run(group: Group, run: TrainingRun, stream: BatchStream) -> None:
    """Copy weights, optimiser, firing record and positions of run and stream from the first process to the others.

    To be called by all of them once, before the first step, after the first process has resumed.
    """
    tensors = run.state_tensors() if group.is_first else {}
    sent: dict[str, Any] = group.share_first(
        {
            "shapes": {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
            "state": run.state(),
            "steps": run.n_steps_done,
            "rows": run.n_rows_done,
            "stream": stream.state_dict(),
        }
    )
    received = {}
    for name, (shape, dtype) in sent["shapes"].items():
        own = tensors[name].detach().to(group.device).clone() if group.is_first else torch.empty(0)
        values = own if group.is_first else torch.empty(shape, dtype=dtype, device=group.device)
        received[name] = group.copy_first(values)
    if not group.is_first:
        run.load_state(received, sent["state"], n_steps_done=sent["steps"], n_rows_done=sent["rows"])
        stream.load_state_dict(sent["stream"])
