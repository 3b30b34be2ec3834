"""Processes that share the features of a transcoder: threads that stand in for them, real ones, and what they do.

``python -m tests.support.sharded_runs FOLDER`` is one of the real ones: it does the same and saves what it gave.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train.stage import TrainResult
from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.sparse import SparseStackStep
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.adaptive import AdaptiveStep
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import StepKernel
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.build import build_run
from tailrace.training.loop.checkpoint import CheckpointWriter, RunCheckpoint
from tailrace.training.loop.distributed import Group, open_group
from tailrace.training.loop.optim import BlockedAdam
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import FeatureShards, ShardedRun, ShardedStep, join, split_parameters
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch
from tests.support.distributed_children import Doubled
from tests.support.planted_runs import SITE, PlantedRows, statistics_of
from tests.support.random_steps import ARCHITECTURES, D_IN, D_OUT, random_batch, random_transcoder

Result = TypeVar("Result")
OBJECTIVE = VarianceObjective(20.0)
N_LAYERS, WIDTH, N_FEATURES = 3, 5, 8
CPU = torch.device("cpu")
KERNELS: dict[str, Callable[[], StepKernel]] = {"dense": DenseStep, "sparse": SparseStep}
STACK_KERNELS: dict[str, Callable[[], StepKernel]] = {"dense": DenseStep, "sparse": SparseStackStep}
RUNS: dict[str, Architecture] = {
    "topk": TopK(k=2, input_bias=True),
    "batch_topk": BatchTopK(k=2, skip=True),
    "jumprelu": JumpReLU(l0=0.1, target_l0=2.0, bandwidth=0.3),
}
N_STEPS, CHECKPOINT = 8, 4


class _Meeting:
    """Where the threads of a group leave what the others take."""

    def __init__(self, size: int) -> None:
        self.box: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)
        self.letters: list[SimpleQueue[Tensor]] = [SimpleQueue() for _ in range(size)]
        self.turn = threading.Lock()
        """One works at a time: what interprets the programs of a GPU cannot be used by two threads."""


class ThreadGroup(Group):
    """A group whose processes are threads of this one. Sums are taken in the order of ranks."""

    shards_features = True

    def __init__(self, rank: int, size: int, meeting: _Meeting, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._meeting = meeting

    def _exchange(self, value: Any) -> list[Any]:
        self._meeting.box[self.rank] = value
        self._meeting.turn.release()
        try:
            self._meeting.barrier.wait()
            values = [*self._meeting.box]
            self._meeting.barrier.wait()
        finally:
            self._meeting.turn.acquire()
        return values

    def add_up(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self._exchange(values.clone())).sum(0))

    def least(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self._exchange(values.clone())).amin(0))

    def gather(self, rows: Tensor) -> list[Tensor]:
        return self._exchange(rows.clone())

    def gather_alike(self, values: Tensor) -> list[Tensor]:
        pieces = self._exchange(values.clone())
        assert len({piece.shape for piece in pieces}) == 1
        return pieces

    def gather_first(self, values: Tensor) -> list[Tensor]:
        pieces = self.gather_alike(values)
        return pieces if self.is_first else []

    def copy_first(self, values: Tensor) -> Tensor:
        first: Tensor = self._exchange(values.clone())[0]
        assert first.dtype == values.dtype
        return values if self.is_first else values.copy_(first)

    def share_first(self, value: Any) -> Any:
        return self._exchange(value)[0]

    def send(self, values: Tensor, rank: int) -> None:
        self._meeting.letters[rank].put(values.clone())

    def receive(self, values: Tensor) -> Tensor:
        self._meeting.turn.release()
        try:
            return values.copy_(self._meeting.letters[self.rank].get(timeout=120))
        finally:
            self._meeting.turn.acquire()

    def wait(self) -> None:
        self._exchange(None)

    def close(self) -> None:
        pass


def in_threads(size: int, work: Callable[[Group], Result], device: torch.device = CPU) -> list[Result]:
    """Return what ``work`` gives in each process of a group; raise the error of the first that fails."""
    meeting, results, errors = _Meeting(size), [None] * size, []

    def go(rank: int) -> None:
        try:
            with meeting.turn:
                results[rank] = work(ThreadGroup(rank, size, meeting, device))  # type: ignore[call-overload]
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


_of_thread = threading.local()


def publish_sharded(
    size: int, settings: TrainSettings, *, device: str = "cpu", features: bool = True, **arguments: Any
) -> TrainResult:
    """Train and publish a transcoder as ``size`` processes do that torchrun started, ``--shard-features`` or not."""

    def work(group: Group) -> TrainResult:
        _of_thread.group, group.shards_features = group, features
        return train.run(settings, compute=Compute(device=device, quiet=True), shard_features=features, **arguments)

    on = torch.device("cuda", 0) if device == "cuda" else CPU
    with mock.patch.object(train, "open_group", side_effect=lambda *_, **__: _of_thread.group):
        return in_threads(size, work, on)[0]


class StepCase(NamedTuple):
    """A transcoder and a kernel that take steps on the same rows."""

    architecture: str
    kernel: str
    is_stack: bool = False


STACKS = {"batch_topk": BatchTopK(k=2), "jumprelu": JumpReLU(l0=0.1, bandwidth=0.5), "relu": ReLU(l1=0.3)}
STEPS = [
    *(StepCase(name, kernel) for name in ARCHITECTURES for kernel in ("dense", "sparse")),
    *(StepCase(name, kernel, True) for name in STACKS for kernel in ("dense", "sparse")),
]
QUICK_STEPS = [
    *(StepCase("topk", "dense"), StepCase("jumprelu-target", "sparse"), StepCase("matryoshka", "dense")),
    StepCase("batch_topk", "sparse", True),
]


def take_steps(case: StepCase, group: Group | None) -> dict[str, Tensor]:
    """Return gradients, losses, counts, what each row gave, and buffers, by name, of two steps in float64."""
    whole, batch, n_layers = _example(case)
    kernel: StepKernel = (STACK_KERNELS if case.is_stack else KERNELS)[case.kernel]()
    transcoder = whole
    if group is not None:
        shards = FeatureShards(group, n_layers)
        transcoder = cut(whole, _built(case, shards.slice_of(whole.d_sae // n_layers).n), shards)
        kernel = ShardedStep(kernel, shards)
    for _ in range(2):  # the second begins from the first one's guesses and memory
        result = kernel(transcoder, batch, OBJECTIVE, per_row=True)
    assert result.per_row is not None
    found = {f"gradient.{name}": value.grad for name, value in transcoder.named_parameters() if value.grad is not None}
    found |= {f"loss.{name}": value for name, value in result.losses.items()}
    found |= {f"buffer.{name}": value for name, value in transcoder.named_buffers()}
    found |= {f"row.{name}": value for name, value in result.per_row._asdict().items()}
    return found | {"n_active": result.n_active, "outputs": result.outputs}


def _example(case: StepCase) -> tuple[Transcoder, Batch, int]:
    if not case.is_stack:
        return random_transcoder(ARCHITECTURES[case.architecture]), random_batch(), 1
    stack = _built(case, N_FEATURES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    stack.constrain_parameters()
    rows = torch.randn(2, 60, N_LAYERS * WIDTH, generator=generator, dtype=torch.float64)
    return stack, Batch(rows[0], rows[1]), N_LAYERS


def _built(case: StepCase, n_features: int) -> Transcoder:
    if case.is_stack:
        return build_stack(STACKS[case.architecture], N_LAYERS, WIDTH, WIDTH, n_features).double()
    return ARCHITECTURES[case.architecture].build(D_IN, D_OUT, n_features).double()


def cut(whole: Transcoder, part: Transcoder, shards: FeatureShards) -> Transcoder:
    """Return ``part``, of as many features as a process has, with the own ones of ``whole``."""
    own = shards.slice_of(whole.d_sae // shards.n_layers)
    part.become_slice(own.first, own.d_sae)
    for name, value in whole.state_dict().items():
        if name in split_parameters(whole):
            n_blocks = shards.n_layers if len(value) == whole.d_sae else 1
            value = value.unflatten(0, (n_blocks, -1))[:, own.first : own.first + own.n].flatten(0, 1)
        part.state_dict()[name].copy_(value)
    return part


def joined(pieces: list[dict[str, Tensor]], blocks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return what processes gave as if by one; raise AssertionError where what they must share differs in a bit."""
    together = {}
    for name, first in pieces[0].items():
        own = [piece[name] for piece in pieces]
        if name in blocks:
            together[name] = join(own, blocks[name])
        else:
            assert all(torch.equal(first, other) for other in own), name
            together[name] = first
    return together


def step_blocks(case: StepCase) -> dict[str, int]:
    """Return the results of ``take_steps`` of which each process has its own features', and of how many layers."""
    whole, _, n_layers = _example(case)
    sizes = {name: len(value) for name, value in whole.named_parameters() if name in split_parameters(whole)}
    return {f"gradient.{name}": n_layers if size == whole.d_sae else 1 for name, size in sizes.items()}


def build_planted(architecture: Architecture, group: Group | None) -> TrainingRun:
    """Return a run in float64 on ``PlantedRows``, with clipping and an average of its weights."""
    settings = TrainSettings(architecture=architecture, d_sae=64, lr=5e-3, ema=0.9, gradient_clip=0.05)
    statistics = statistics_of(PlantedRows().next_batch()[SITE.name].inputs)
    device = CPU if group is None else group.device
    run = build_run(
        settings, SITE, {"in": statistics}, n_steps=N_STEPS, device=device, precision="float32", group=group
    )
    transcoder = run.transcoder.double()
    common: dict[str, Any] = {"lr": run.lr, "firing": run.firing, "average": WeightAverage(transcoder, 0.9)}
    parts = (run.objective, run.rows)
    if group is None:
        adam = BlockedAdam(transcoder, clip=0.05)
        return TrainingRun(transcoder, *parts, AdaptiveStep("float32"), adam, run.schedule, **common)
    shards = FeatureShards(group)
    kernel = ShardedStep(AdaptiveStep("float32"), shards, clip=0.05)
    return ShardedRun(shards, transcoder, *parts, kernel, BlockedAdam(transcoder), run.schedule, **common)


def train_planted(
    architecture: Architecture, group: Group | None, folder: Path, *, resume: bool = False
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train, or go on from the checkpoint in ``folder``; return the state, and which tensors are of own features."""
    run, stream = build_planted(architecture, group), Doubled()
    if group is not None and not group.is_first:
        assert isinstance(run, ShardedRun)
        run.serve()
    else:
        _drive(run, stream, folder, resume=resume)
    state = {name: value.detach().clone() for name, value in run._tensors().items()}
    assert run.latest is not None
    state |= {f"loss.{name}": value for name, value in run.latest.losses.items()}
    blocks = dict(run._described().blocks) if isinstance(run, ShardedRun) else {}
    return state | {"n_active": run.latest.n_active}, blocks


def _drive(run: TrainingRun, stream: Doubled, folder: Path, *, resume: bool) -> None:
    files = run.checkpoints(folder)
    first_step = CHECKPOINT if resume else 0
    if resume:
        assert files.steps() == [CHECKPOINT]
        checkpoint = files.load(CHECKPOINT)
        state = checkpoint.state
        stream.load_state_dict(state["stream"])
        run.load_state(checkpoint.tensors, state["run"], n_steps_done=CHECKPOINT, n_rows_done=state["rows"])
    with CheckpointWriter(CPU) as writer:
        for step in range(first_step, N_STEPS):
            run.step(stream.next_batch())
            if step + 1 == CHECKPOINT:
                state = {"run": run.state(), "stream": stream.state_dict(), "rows": run.n_rows_done}
                writer.write(files, RunCheckpoint(step + 1, run.state_tensors(), state))
    run.release()


def main(folder: Path) -> None:
    """Do everything as one of the processes that ``open_group`` finds, and save what it gave."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    with open_group(meeting=meeting, shards_features=True) or sys.exit("not a group") as group:
        for index, case in enumerate(STEPS):
            _save(folder / f"step-{index}", group, take_steps(case, group))
        for kind, architecture in RUNS.items():
            _save(folder / f"run-{kind}", group, train_planted(architecture, group, folder / kind)[0])


def _save(folder: Path, group: Group, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, folder / f"{group.rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
