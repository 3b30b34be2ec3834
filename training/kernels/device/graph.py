"""The sparse step as a CUDA graph: captured once, it is one launch instead of dozens.

A graph reads and writes the same memory every time, and has the numbers of the host as they were. So it is captured
once those have stood still for some steps, for one size of batch and one room for pairs, and again when they change. A
step that is asked for more than usual is taken as before, and so is every step where capturing fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.device.pairs import PairGradient
from tailrace.training.kernels.device.proof import unchanged
from tailrace.training.kernels.device.step import DeviceStep
from tailrace.training.kernels.kernel import ExtraLoss, StepResult
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

logger = logging.getLogger(__name__)

STANDING_STILL = 3
"""Steps for which nothing has changed before a graph is captured: by then every program is compiled, too."""
AGREEMENT = 1e-3
"""Relative, of the loss: matrix products may take another way in a graph."""


class Graph(Protocol):
    """What was captured."""

    def capture(self) -> AbstractContextManager[None]:
        """Capture what is launched inside, which need not be computed yet."""
        ...

    def replay(self) -> None:
        """Launch it."""
        ...


class CudaGraph:
    """A graph of CUDA. Other threads may go on allocating memory while it is captured."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture what is launched inside, without computing it."""
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


class CapturedStep:
    """A sparse step, captured where it can be; ``gradients`` hold what the graph wrote."""

    def __init__(self, step: DeviceStep, *, name: str = "transcoder", graph: Callable[[], Graph] = CudaGraph) -> None:
        self._step, self._name, self._build_graph = step, name, graph
        self.is_possible = True
        """False once capturing has failed."""
        self.graph: Graph | None = None
        self._signature: tuple[Any, ...] | None = None
        self._n_same = 0
        self._batch: Batch | None = None
        self._result: StepResult | None = None
        self._gradients: dict[str, Tensor | None] = {}
        self._at_pairs: dict[str, PairGradient] = {}
        self._n_candidates: Tensor | None = None

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
        """Take the step; its result is overwritten by the next."""
        usual = not extra and not per_row and reductions is ALONE and self._step.gradients.fused
        if not (usual and self.is_possible and self._stands_still(transcoder, batch)):
            return self._step(transcoder, batch, objective, extra, per_row=per_row, reductions=reductions)
        if self.graph is None and not self._try_to_capture(transcoder, batch, objective):
            return self._step(transcoder, batch, objective)
        assert self._batch is not None, "what was captured has a batch"
        assert self._result is not None, "and a result"
        assert self.graph is not None, "and a graph"
        self._batch.inputs.copy_(batch.inputs)
        self._batch.outputs.copy_(batch.outputs)
        kept = self._step.gradients
        kept.screen.refresh(transcoder.W_enc)
        self.graph.replay()
        for name, parameter in transcoder.named_parameters():
            parameter.grad = self._gradients[name]
        kept.at_pairs, kept.n_candidates = dict(self._at_pairs), self._n_candidates
        return self._result

    def _stands_still(self, transcoder: Transcoder, batch: Batch) -> bool:
        """Tell whether the host's numbers were the same for some steps; where they changed, drop the graph."""
        numbers = tuple((name, value) for name, value in vars(transcoder).items() if isinstance(value, (int, float)))
        signature = (len(batch.inputs), self._step.n_slots, id(transcoder), numbers)
        if signature != self._signature:
            self._signature, self._n_same, self.graph = signature, 0, None
        self._n_same += 1
        return self._n_same > STANDING_STILL

    def _try_to_capture(self, transcoder: Transcoder, batch: Batch, objective: Objective) -> bool:
        """Capture the step and compare its loss; return whether it can be used."""
        problem = ""
        try:
            error = self._capture(transcoder, batch, objective)
            if not error < AGREEMENT:
                problem = f"its loss differs by {error:.1e}"
        except Exception as broken:  # whatever a driver may raise
            problem = f"{type(broken).__name__}: {broken}"
        if problem:
            self.is_possible, self.graph = False, None
            logger.warning(
                "%s: the step is launched operator by operator, because it cannot be captured as a CUDA graph (%s). "
                "Please report this, with the versions of torch and triton",
                self._name,
                problem,
            )
        return not problem

    def _capture(self, transcoder: Transcoder, batch: Batch, objective: Objective) -> float:
        """Capture the step, and return the relative difference of its loss from that of a step as before."""
        kept = self._step.gradients
        with unchanged(transcoder):
            wanted = float(self._step(transcoder, batch, objective).losses["loss"])
        with unchanged(transcoder):
            self._batch = Batch(batch.inputs.clone(), batch.outputs.clone())
            self.graph = self._build_graph()
            with self.graph.capture():
                self._result = self._step(transcoder, self._batch, objective)
            self._gradients = {name: value.grad for name, value in transcoder.named_parameters()}
            self._at_pairs, self._n_candidates = dict(kept.at_pairs), kept.n_candidates
            self.graph.replay()
            found = float(self._result.losses["loss"])
        return abs(found - wanted) / max(abs(wanted), 1e-30)
