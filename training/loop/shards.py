"""One transcoder whose features several processes share, for a dictionary that is larger than a GPU.

Each process has the weights, gradients and optimiser state of its slice of the features and sees all rows. What the
features write is added up over processes; what belongs to no feature, such as the output bias, is in every process
and the same there. The first process reads the rows, keeps the log and says what comes next; the others ``serve``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.kernels.kernel import ExtraLoss, StatefulKernel, StepKernel, StepResult
from tailrace.training.loop.checkpoint import Checkpoints, CheckpointWriter, RunCheckpoint, Shards
from tailrace.training.loop.distributed import Group, Layout, SharedBatch, layout_of
from tailrace.training.loop.evaluate import HeldoutScore, evaluate, in_pieces, predictor, score_layers
from tailrace.training.loop.initialise import FeatureSlice
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch, SiteBatches


def refuse_shards(settings: TrainSettings, sites: Sequence[Site], size: int, *, starts: bool = False) -> None:
    """Raise SettingsError with every problem for which ``size`` processes cannot share the features.

    ``starts`` says that a published transcoder is to be started from.
    """
    d_sae, problems = settings.n_features(sites[0].d_in), []
    if d_sae % size:
        near = sorted({max(1, d_sae // size) * size, (d_sae // size + 1) * size})
        problems.append(
            f"d_sae: {size} processes cannot have equal shares of {d_sae} features; {' or '.join(map(str, near))} "
            "can be shared, or start another number of processes"
        )
    if settings.auxiliary.kind != "none":
        problems.append(
            f"auxiliary: {settings.auxiliary.kind} compares dead features with each other, which are in several "
            "processes; leave it out"
        )
    if settings.resampling.kind != "none":
        problems.append("resampling: looks at all features at once; leave it out")
    if settings.optimiser == "muon":
        problems.append("optimiser: muon mixes the rows of a matrix, which are in several processes; use adam or adamw")
    if settings.kernel == "compiled":
        problems.append("kernel: compiled cannot wait for other processes within a step; use auto, dense or sparse")
    if getattr(settings.architecture, "tied_bias", False):
        problems.append("architecture.tied_bias: is not added up over processes; leave it out")
    if starts:
        problems.append("--from: the weights to start from are not shared out; leave it out")
    if problems:
        raise SettingsError(
            "--shard-features: cannot be used with these settings:\n" + "\n".join(f"  {line}" for line in problems)
        )


class FeatureShards(SharedBatch):
    """A batch all rows of which are in every process of a group, whose features are slices.

    The features of each of ``n_layers`` layers lie together, and a process has a slice of each. Every method must be
    called by all processes, in one order.
    """

    shares_features = True

    def __init__(self, group: Group, n_layers: int = 1) -> None:
        super().__init__(group, 1, 1)
        self.group, self.n_layers = group, n_layers

    def slice_of(self, d_sae: int) -> FeatureSlice:
        """Return which of the ``d_sae`` features of a layer are here."""
        n_own = d_sae // self.group.size
        return FeatureSlice(self.group.rank * n_own, n_own, d_sae)

    def n_rows(self, own: int) -> int:
        """Return ``own``: all rows are at hand."""
        return own

    def n_features(self, own: int) -> int:
        """Return the number of features of all processes."""
        return own * self.group.size

    def total(self, counts: Tensor) -> Tensor:
        """Return ``counts``, which are of all rows."""
        return counts

    def mean(self, own: Tensor) -> Tensor:
        """Return ``own``, the mean over all rows."""
        return own

    def among_largest(self, values: Tensor, k: int) -> Tensor:
        """Return which of ``values`` are among the ``k`` largest of their row; of equal ones, the first processes'."""
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        padded = values.new_full((len(values), k), -torch.inf)
        padded[:, : values.shape[1]] = values
        pieces = self.group.gather_alike(padded)
        everything = torch.cat(pieces, 1)
        cut = everything.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        left = k - (everything > cut).sum(1, keepdim=True)
        for piece in pieces[: self.group.rank]:
            left -= (piece == cut).sum(1, keepdim=True)
        equal = values == cut
        return (values > cut) | (equal & (equal.cumsum(1) <= left))

    def over_features(self, own: Tensor) -> Tensor:
        """Return the sum over all processes, of numbers in bfloat16 in float32; its gradient is that of ``own``."""
        whole: Tensor = _AddedUp.apply(own.float() if own.dtype == torch.bfloat16 else own, self.group)  # type: ignore[no-untyped-call]
        return whole

    def once(self, constant: Tensor) -> Tensor:
        """Return ``constant`` in the first process, zero in the others; the gradient reaches it in all."""
        alone: Tensor = _InFirst.apply(constant, self.group.is_first)  # type: ignore[no-untyped-call]
        return alone

    def all_features(self, own: Tensor) -> Tensor:
        """Return (d_sae,) of a value for each own feature."""
        return join(self.group.gather_alike(own), self.n_layers)


class _AddedUp(torch.autograd.Function):
    """The sum over a group, in which every process computes the same loss from it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:  # noqa: ARG004
        return group.add_up(own.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _InFirst(torch.autograd.Function):
    """A constant that one process adds for all."""

    @staticmethod
    def forward(ctx: Any, constant: Tensor, is_first: bool) -> Tensor:  # noqa: ARG004
        return constant.clone() if is_first else torch.zeros_like(constant)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def join(pieces: Sequence[Tensor], n_blocks: int) -> Tensor:
    """Return all rows of the pieces of the processes in order, of which each has a slice of ``n_blocks`` blocks."""
    blocks = [piece.view(n_blocks, -1, *piece.shape[1:]) for piece in pieces]
    return torch.cat(blocks, 1).flatten(0, 1)


class ShardedStep:
    """A kernel on this process's features, whose losses, gradients and counts are made those of all.

    Clips the gradient, if asked to, by its norm over all features: no process's optimiser could.
    """

    def __init__(self, kernel: StepKernel, shards: FeatureShards, *, clip: float | None = None) -> None:
        self._kernel, self._shards, self._clip = kernel, shards, clip

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
        """Set ``.grad`` of every parameter and return the loss terms, with ``n_active`` of all features."""
        assert reductions is ALONE, "features are shared, and rows are not"
        result = self._kernel(transcoder, batch, objective, extra, per_row=per_row, reductions=self._shards)
        self._complete_gradients(transcoder)
        rows, group = result.per_row, self._shards.group
        if rows is not None:
            rows = rows._replace(l0=group.add_up(rows.l0.clone()), l1=group.add_up(rows.l1.clone()))
        return result._replace(n_active=self._shards.all_features(result.n_active), per_row=rows)

    @torch.no_grad()
    def _complete_gradients(self, transcoder: Transcoder) -> None:
        """Make gradients of what belongs to no feature those of all features, bit for bit the same in each process."""
        group, split = self._shards.group, split_parameters(transcoder)
        shared, own = [], []
        for name, parameter in transcoder.named_parameters():
            if parameter.grad is None:
                continue
            if name in split:
                own.append(parameter.grad)
                continue
            parameter.grad = parameter.grad.contiguous()
            # Inputs meet only own features; what is added to the outputs has had its gradient from all of them.
            complete = group.add_up if name == "b_dec" else group.copy_first
            shared.append(complete(parameter.grad))
        if self._clip is None:
            return
        transcoder.constrain_gradients()
        squares = group.add_up(_squares(own, group.device)) + _squares(shared, group.device)
        scale = (self._clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in (*own, *shared):
            gradient.mul_(scale.to(gradient.dtype))

    def state(self) -> dict[str, Any] | None:
        """Return the inner kernel's state."""
        return self._kernel.state() if isinstance(self._kernel, StatefulKernel) else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from ``state``."""
        if isinstance(self._kernel, StatefulKernel):
            self._kernel.load_state(state)


def _squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient).double().square()
    return total


def split_parameters(transcoder: Transcoder) -> frozenset[str]:
    """Return the names of the parameters with a row per feature, of which each process has its own rows."""
    return frozenset(transcoder.rows_of(torch.empty(0, dtype=torch.int64)))


class ShardedRun(TrainingRun):
    """A run whose features are slices in the processes of a group.

    The first process is used like any run. Each method announces itself to the others, which do the same in ``serve``.
    """

    def __init__(self, shards: FeatureShards, transcoder: Transcoder, *arguments: Any, **options: Any) -> None:
        super().__init__(transcoder, *arguments, **options)
        self._shards, self._group = shards, shards.group
        self._split = split_parameters(transcoder)
        self._files: _ShardCheckpoints | None = None

    def step(self, batches: SiteBatches) -> None:
        """Take one step; in the other processes on the rows of the first one."""
        layout = layout_of(batches) if self._group.is_first else {}
        self._say("step", layout, self.wants_rows(self.n_steps_done + 1))
        super().step(self._send(batches, layout))

    def _step_beside(self, layout: Layout, per_row: bool) -> None:
        self.wants_rows = lambda _: per_row
        super().step(self._receive(layout))

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted raw outputs of raw inputs, and which of the own features fired."""
        outputs, active = predictor(self.scored, self._shards)(self.on_device.inputs(inputs))
        return self.on_device.restore(outputs), active

    def score(self, batches: Iterable[SiteBatches]) -> HeldoutScore:
        """Return the score of all features."""
        self._say("score")
        shared = self._share(batches)
        if len(self.rows.sites) == 1:
            (site,) = self.rows.sites
            with self._products():
                rows = (batch[site] for batch in shared)
                return evaluate(self.predict, rows, self.rows.ordinary.get(site), self._shards)
        joined = map(self._rows_on_device, in_pieces(shared, self.scored.d_sae))
        with self._products():
            rows = (batch for batch in joined if len(batch.inputs))
            return evaluate(predictor(self.scored, self._shards), rows, None, self._shards)

    def score_layers(self, batches: Iterable[SiteBatches]) -> Mapping[str, HeldoutScore]:
        """Return the score of each layer's output, of all features."""
        self._say("score_layers")
        own = super().folded().to(self._group.device)
        assert isinstance(own, CrossLayerTranscoder), "that is what a stack becomes"
        return score_layers(own, self.rows.sites, self._share(batches), self.rows.mask, self._shards)

    @torch.no_grad()
    def folded(self) -> Transcoder:
        """Return, in the first process, the transcoder with all features as it would be published, on the CPU."""
        self._say("folded")
        whole = super().folded()
        split = split_parameters(whole)
        for name, own in [*whole.named_parameters()]:
            if name in split:
                pieces = self._group.gather_first(own.detach())  # one parameter at a time, on the host
                if self._group.is_first:
                    joined = join(pieces, self._n_blocks(len(own)))
                    setattr(whole, name, nn.Parameter(joined, own.requires_grad))
        return whole

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything a step depends on in this process. Raises NonFiniteActivation for a bad weight in any."""
        self._say("state_tensors")
        return super().state_tensors()

    def _all_finite(self, *values: Tensor) -> bool:
        own = torch.tensor(float(super()._all_finite(*values)), device=self._group.device)
        return bool(self._group.least(own))

    def state(self) -> dict[str, Any]:
        """Return the rest, and which tensors are slices."""
        return {**super().state(), "shards": self._described()._asdict()}

    def _described(self) -> Shards:
        blocks = {
            name: self._n_blocks(len(value))
            for name, value in super()._tensors().items()
            if value.ndim and name.rpartition(".")[2] in self._split
        }
        return Shards(self._group.size, blocks)

    def _n_blocks(self, n_rows: int) -> int:
        """Return how many layers' features the ``n_rows`` own ones of a parameter are."""
        return self._shards.n_layers if n_rows == self.transcoder.d_sae else 1

    def checkpoints(self, directory: Path) -> Checkpoints:
        """Return the checkpoints, of which each process writes and reads its own part."""
        self._say("checkpoints", directory)
        self._files = _ShardCheckpoints(directory, self)
        return self._files

    def load_state(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, n_steps_done: int, n_rows_done: int
    ) -> None:
        """Continue from the checkpoint at ``n_steps_done``; the other processes read their part of it."""
        self._say("load", n_steps_done, n_rows_done)
        super().load_state(tensors, state, n_steps_done=n_steps_done, n_rows_done=n_rows_done)

    def _load_beside(self, n_steps_done: int, n_rows_done: int) -> None:
        assert self._files is not None
        part = self._files.load(n_steps_done)
        super().load_state(part.tensors, part.state["run"], n_steps_done=n_steps_done, n_rows_done=n_rows_done)

    def begin_checkpoint(self) -> None:
        """Let the other processes begin to write a checkpoint, once all are done with the one before."""
        if self._group.is_first:
            self._say("save")
            self._group.wait()

    def _save_beside(self, writer: CheckpointWriter, before: Future[None] | None) -> Future[None]:
        if before is not None:
            before.result()
        self._group.wait()
        assert self._files is not None
        described, tensors = self._described(), super()._tensors()
        own = {name: tensors[name] for name in described.blocks}
        return writer.write(self._files, RunCheckpoint(self.n_steps_done, own, {"run": self.state()}))

    def release(self) -> None:
        """Let the other processes go."""
        self._say("release")

    def serve(self) -> None:
        """Do in this process what the first one says, until the run is over."""
        written: Future[None] | None = None
        with CheckpointWriter(self._group.device) as writer:
            while True:
                name, *arguments = self._group.share_first(None)
                match name:
                    case "step":
                        self._step_beside(*arguments)
                    case "score" | "score_layers":
                        getattr(self, name)(())
                    case "folded" | "state_tensors":
                        getattr(self, name)()
                    case "checkpoints":
                        self.checkpoints(*arguments)
                    case "load":
                        self._load_beside(*arguments)
                    case "save":
                        written = self._save_beside(writer, written)
                    case _:
                        break
            if written is not None:
                written.result()

    def _say(self, *order: Any) -> None:
        if self._group.is_first:
            self._group.share_first(order)

    def _share(self, batches: Iterable[SiteBatches]) -> Iterator[SiteBatches]:
        """Yield, in every process, the ``batches`` of the first one."""
        if self._group.is_first:
            for batch in batches:
                layout = layout_of(batch)
                self._say(layout)
                yield self._send(batch, layout)
            self._say(None)
        else:
            while (order := self._group.share_first(None))[0] is not None:
                yield self._receive(*order)

    def _send(self, batches: SiteBatches, layout: Layout) -> SiteBatches:
        for site, (_, _, outputs) in layout.items():
            self._group.copy_first(batches[site].inputs.contiguous())
            if outputs is not None:
                self._group.copy_first(batches[site].outputs.contiguous())
        return batches

    def _receive(self, layout: Layout) -> SiteBatches:
        received = {}
        for site, (dtype, *shapes) in layout.items():
            sides = [
                self._group.copy_first(torch.empty(shape, dtype=dtype, device=self._group.device))
                for shape in shapes
                if shape is not None
            ]
            received[site] = Batch(sides[0], sides[-1])
        return received


class _ShardCheckpoints(Checkpoints):
    """This process's part of a run's checkpoints; the first process's ``begin`` lets the others write theirs."""

    def __init__(self, directory: Path, run: ShardedRun) -> None:
        super().__init__(directory, run._group.rank, run._group.size)
        self._run = run

    def begin(self) -> None:
        """Let the other processes begin, too."""
        self._run.begin_checkpoint()
