"""Which step a GPU takes: the sparse one where it was proven right and faster on the run's own batches, else the dense.

What is chosen goes into the run's state, so that a resumed run takes the same. Nothing here waits for the device but
the proof: how many pairs were active is read two steps later, when the number has long arrived.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tailrace.storage.errors import ActionableError, SettingsError, is_out_of_memory
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device.graph import CapturedStep
from tailrace.training.kernels.device.proof import largest_error, unchanged
from tailrace.training.kernels.device.screen import Screen
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep, slots_for
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepKernel, StepResult, suits_sparse
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.transfer import arrived, to_host

logger = logging.getLogger(__name__)

LARGEST_ERROR = 1e-3
"""Relative; products in float32 agree to 1e-6, and a pair at the edge of a selection moves a gradient by 1e-4."""
LAG = 2
"""Steps after which numbers of a step are read: it is done while the host prepares the next but one."""
TIMED_STEPS = 3
NEVER = 10**12
"""Microseconds of a step that the memory does not hold."""


class DeviceChoice:
    """The sparse step of a GPU, or the dense one.

    With ``prove`` the first batch that few features fire on decides: the sparse step must agree with the dense one in
    float32 and take less time than the dense one in the run's precision. Processes that share a batch decide together.
    """

    def __init__(self, sparse: DeviceStep, precision: Precision, *, name: str, prove: bool = True) -> None:
        self._sparse, self._name = sparse, name
        self._captured = CapturedStep(sparse, name=name)
        self._dense: StepKernel = DenseStep(precision)
        self._prove = prove
        self.choice: str | None = None if prove else "sparse"
        """``sparse`` or ``dense``; None before the proof."""
        self.is_sparse: bool | None = None
        """Whether few enough features fire; None before the first step."""
        self._late: deque[_Late] = deque()
        self._share = 1.0
        """The part of all rows × features that was here in the latest step."""
        self._is_of_all = False
        """Whether the numbers at hand are of a checkpoint, which are as if all rows and features were here."""
        self._has_run = False
        self.gradients.trusted = not prove

    @property
    def gradients(self) -> DeviceGradients:
        """What the step leaves to the optimiser."""
        return self._sparse.gradients

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
        """Set ``.grad`` of every parameter, or leave it to ``gradients``, and return the loss terms."""
        n_rows, d_sae = reductions.n_rows(len(batch.inputs)), reductions.n_features(transcoder.d_sae)
        self._take_share(len(batch.inputs) * transcoder.d_sae / (n_rows * d_sae))
        self._read_late(transcoder, len(batch.inputs), n_rows, d_sae)
        self._choose_by_density(transcoder, d_sae)
        if self.is_sparse and self.choice is None:
            self._put_to_the_proof(transcoder, batch, objective, reductions)
        if self.is_sparse and self.choice == "sparse":
            with nullcontext() if self._prove else self._refusing_what_does_not_run(is_alone=reductions is ALONE):
                result = self._captured(transcoder, batch, objective, extra, per_row=per_row, reductions=reductions)
            assert self.gradients.n_candidates is not None, "a step has just counted them"
            self._remember(result, self.gradients.n_candidates, reductions)
        else:
            self.gradients.at_pairs.clear()
            if self.gradients.overflow is not None:
                self.gradients.overflow.zero_()
            result = self._dense(transcoder, batch, objective, extra, per_row=per_row, reductions=reductions)
            if isinstance(transcoder.selection(), Above):
                self._remember(result, None, reductions)
        return result

    @contextmanager
    def _refusing_what_does_not_run(self, *, is_alone: bool) -> Iterator[None]:
        """Raise SettingsError for what a compiler says of the first sparse step, which nothing has proven."""
        try:
            yield
        except ActionableError:
            raise
        except Exception as error:
            is_of_device = is_out_of_memory(error) or str(error).startswith("CUDA error")
            is_of_others = not is_alone and isinstance(error, RuntimeError)  # a process that ended, for one
            if self._has_run or is_of_device or is_of_others:
                raise
            raise SettingsError(
                f"kernel: sparse: the sparse step does not run here ({_summary(error)}); use auto or dense, and please "
                f"report this, with torch {torch.__version__} and triton {triton.__version__}"
            ) from error
        self._has_run = True

    def _choose_by_density(self, transcoder: Transcoder, d_sae: int) -> None:
        """Take note of the density that a selection of the largest of ``d_sae`` has; where it has none, begin dense."""
        selection = transcoder.selection()
        if isinstance(selection, Above):
            if self.is_sparse is None:
                self.is_sparse = not self._prove
        else:
            self._by_density(selection.k / d_sae)

    def _by_density(self, density: float) -> None:
        before = self.is_sparse
        self.is_sparse = not self._prove or suits_sparse(density, before)
        if self.is_sparse is not before and before is not None and self.choice != "dense":
            kind = "sparse" if self.is_sparse else "dense"
            logger.info("%s: %.2f%% of activations are not zero, steps are %s", self._name, 100 * density, kind)

    def _remember(self, result: StepResult, n_candidates: Tensor | None, reductions: BatchReductions) -> None:
        """Have the numbers of a step sent to the host, to be read later: what all processes choose by."""
        active = on_its_way(reductions.over_features(result.n_active.sum()))
        if n_candidates is not None and reductions is not ALONE:
            n_candidates = -reductions.least(-n_candidates)
        wanted = None if n_candidates is None else on_its_way(n_candidates)
        self._late.append(_Late(result.n_rows, active, wanted, self._sparse.n_slots))

    def _take_share(self, share: float) -> None:
        """Note which part of all rows × features is here, of which the numbers of a checkpoint are to be."""
        self._share = share
        if self._is_of_all:
            self._is_of_all = False
            if self._sparse.n_slots is not None:
                self._sparse.n_slots = max(1, round(self._sparse.n_slots * share))
            self._late = deque(one.times(share) for one in self._late)

    def _read_late(self, transcoder: Transcoder, own_rows: int, n_rows: int, d_sae: int) -> None:
        """Take note of what happened two steps ago: how many pairs were active, and whether there was room for them."""
        while len(self._late) >= LAG:
            late = self._late.popleft()
            n_active = late.active()
            # a dense step had no candidates; what was active, twice of which there is room for, is about as many
            n_candidates = round(n_active * self._share) if late.wanted is None else late.wanted()
            selection = transcoder.selection()
            if isinstance(selection, Above):
                self._by_density(n_active / (late.n_rows * d_sae))
            if late.wanted is not None and late.n_slots is not None and n_candidates > late.n_slots:
                logger.warning(
                    "%s: a step had %d candidate pairs and room for %d; it changed no weight, and there is more room "
                    "from now on",
                    self._name,
                    n_candidates,
                    late.n_slots,
                )
            least = 1 if isinstance(selection, Above) else slots_for(selection, own_rows, transcoder.d_sae)
            n_likely = n_candidates * n_rows // late.n_rows  # batches may differ
            self._sparse.n_slots = _room(n_likely, self._sparse.n_slots, least, own_rows * transcoder.d_sae)

    def _put_to_the_proof(
        self, transcoder: Transcoder, batch: Batch, objective: Objective, reductions: BatchReductions
    ) -> None:
        device = batch.inputs.device
        error, problem, times, is_fault = 0.0, "", (0, 0), True
        try:
            error = largest_error(self._sparse, transcoder, batch, objective)
            if not error < LARGEST_ERROR:
                problem = f"its numbers differ from those of the dense step by {error:.1e}"
            else:
                sparse = _microseconds(self._sparse, transcoder, batch, objective)
                self.gradients.at_pairs.clear()  # the dense step gets their memory
                times = (sparse, _microseconds(self._dense, transcoder, batch, objective))
        except Exception as broken:  # whatever a compiler, a driver or a GPU may raise
            problem, is_fault = _summary(broken), not is_out_of_memory(broken)
        is_right = bool(reductions.least(torch.tensor(float(not problem), device=device)) > 0)
        sparse_time, dense_time = reductions.of_all(torch.tensor(times, device=device)).tolist()
        self.choice = "sparse" if is_right and sparse_time < dense_time else "dense"
        self.gradients.trusted = is_right
        self.gradients.at_pairs.clear()
        if self.choice == "dense":
            self.gradients.screen = Screen()  # its memory, which no step will read
        if not is_right:
            versions = (
                f"GPU {torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
            )
            logger.warning(
                "%s: steps are dense, because the sparse step failed its proof (%s)%s",
                self._name,
                problem or "in another process",
                f". Please report this, with {versions}" if is_fault else "",
            )
            return
        logger.info(
            "%s: steps are %s: the sparse one is right to %.0e and %s, the dense one %s",
            self._name,
            self.choice,
            error,
            _said(sparse_time),
            _said(dense_time),
        )

    def state(self) -> dict[str, Any]:
        """Return what was chosen, and the numbers that are still to be read, as JSON."""
        times = 1.0 if self._is_of_all else 1 / self._share
        of_all = [late.times(times) for late in self._late]
        return {
            "is_sparse": self.is_sparse,
            "choice": self.choice,
            "is_trusted": self.gradients.trusted,
            "n_slots": None if self._sparse.n_slots is None else round(self._sparse.n_slots * times),
            "late": [late.as_json() for late in of_all],
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from ``state``; from that of a run that began without this choice, choose."""
        if state is None or "choice" not in state:
            return
        self.is_sparse, self.choice = state["is_sparse"], state["choice"] if self._prove else "sparse"
        self.gradients.trusted = state["is_trusted"] or not self._prove
        self._sparse.n_slots, self._is_of_all = state["n_slots"], True
        self._late = deque(_Late.of(*numbers) for numbers in state["late"])


class _Late(NamedTuple):
    """What is still to be read of a step."""

    n_rows: int
    """Of all processes."""
    active: Callable[[], int]
    """How many pairs of all processes were active."""
    wanted: Callable[[], int] | None
    """For how many pairs there had to be room, in the process where they were most; None of a dense step."""
    n_slots: int | None
    """For how many there was; None where it was not known yet what is needed, and in checkpoints of older versions."""

    @classmethod
    def of(cls, n_rows: int, active: int, wanted: int | None, n_slots: int | None = None) -> _Late:
        """Return what ``as_json`` gave."""
        return cls(n_rows, partial(int, active), None if wanted is None else partial(int, wanted), n_slots)

    def as_json(self) -> list[int | None]:
        """Wait for the numbers and return them."""
        return [self.n_rows, self.active(), None if self.wanted is None else self.wanted(), self.n_slots]

    def times(self, factor: float) -> _Late:
        """Return the same of a process that has so many times the rows × features."""
        wanted, n_slots = self.wanted, self.n_slots
        return self._replace(
            wanted=None if wanted is None else lambda: round(wanted() * factor),
            n_slots=None if n_slots is None else round(n_slots * factor),
        )


def _room(n_wanted: int, before: int | None, least: int, most: int) -> int:
    """Return room for what was wanted, twice as much at least; as before while that is neither scarce nor far more."""
    if before is not None and before >= least and n_wanted * 8 >= before >= n_wanted * 5 // 4:
        return before
    return max(1, min(most, max(least, 1 << max(6, 2 * n_wanted - 1).bit_length())))


def on_its_way(value: Tensor) -> Callable[[], int]:
    """Start to copy a number to the host; return what waits until it is there and reads it."""
    if not value.is_cuda:
        number = int(value)
        return lambda: number
    host, event = to_host(value), arrived()

    def read() -> int:
        event.synchronize()
        return int(host)

    return read


def _microseconds(step: StepKernel, transcoder: Transcoder, batch: Batch, objective: Objective) -> int:
    """Return how long a step takes on average, the first left out; ``NEVER`` if the memory does not hold one."""
    try:
        with unchanged(transcoder):
            step(transcoder, batch, objective)
            torch.cuda.synchronize(batch.inputs.device)
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                step(transcoder, batch, objective)
            torch.cuda.synchronize(batch.inputs.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return NEVER
    return round(1e6 * (time.perf_counter() - start) / TIMED_STEPS)


def _summary(error: Exception) -> str:
    """Return an error's class and the line that says what is wrong: around it, compilers show code and commands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for sign in ("fatal", "error") for line in lines if sign in line.lower()]
    return ": ".join((type(error).__name__, *(telling or lines[-1:])[:1]))


def _said(microseconds: int) -> str:
    return "does not fit into memory" if microseconds >= NEVER else f"takes {microseconds / 1000:.2f} ms"


def build_choice(
    precision: Precision,
    build_step: Callable[[DeviceGradients], DeviceStep] | None,
    *,
    name: str,
    fused: bool,
    prove: bool,
) -> DeviceChoice:
    """Return the choice; ``build_step`` makes the sparse step, by default that of one layer."""
    return DeviceChoice((build_step or DeviceStep)(DeviceGradients(fused=fused)), precision, name=name, prove=prove)
