"""Which kernel computes a step: a function of settings, device and the number of features that fired, never of time.

So a run that is resumed takes the same kernel for every step as one that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above
from tailrace.training.architectures.objectives import Objective
from tailrace.training.choices import KernelKind
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepKernel, StepResult
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

logger = logging.getLogger(__name__)

SPARSE_BELOW = 0.05
"""Share of active pairs below which the sparse step takes over."""
DENSE_ABOVE = 0.08
"""Share above which the dense step does; they cross at about 0.07 (`benchmarks/step_density.py`)."""


class AdaptiveStep:
    """The sparse step where few features fire, the dense one where many do."""

    def __init__(self, precision: Precision, *, name: str = "transcoder", sparse: StepKernel | None = None) -> None:
        self._name = name
        self._dense: StepKernel = DenseStep(precision)
        self._sparse: StepKernel = sparse or SparseStep(precision)
        self.is_sparse: bool | None = None
        """Which one computes the next step; None before the first."""

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
        """Set ``.grad`` of every parameter and return the loss terms."""
        if self.is_sparse is None:
            self._choose(_expected_density(transcoder))
        # a row that is not finite is for the dense step, whose loss will say so
        sparse = self.is_sparse and bool(torch.isfinite(batch.inputs.sum()))
        kernel: StepKernel = self._sparse if sparse else self._dense
        result = kernel(transcoder, batch, objective, extra, per_row=per_row, reductions=reductions)
        # of the whole batch, so that processes which share one choose alike
        self._choose(int(result.n_active.sum()) / (result.n_rows * transcoder.d_sae))
        return result

    def _choose(self, density: float) -> None:
        before = self.is_sparse
        if density < SPARSE_BELOW:
            self.is_sparse = True
        elif density > DENSE_ABOVE or before is None:
            self.is_sparse = False
        if self.is_sparse is not before:
            kind = "sparse" if self.is_sparse else "dense"
            logger.info("%s: %.2f%% of activations are not zero, steps are %s", self._name, 100 * density, kind)

    def state(self) -> dict[str, Any]:
        """Return which kernel is next, as JSON."""
        return {"is_sparse": self.is_sparse}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from ``state``."""
        self.is_sparse = None if state is None else state["is_sparse"]


def _expected_density(transcoder: Transcoder) -> float:
    """Return the share of active pairs a selection promises; where it promises none, training begins dense."""
    selection = transcoder.selection()
    return 1.0 if isinstance(selection, Above) else selection.k / transcoder.d_sae


def build_kernel(kind: KernelKind, precision: Precision, device: torch.device, *, name: str) -> StepKernel:
    """Return the kernel of a run; on devices other than the CPU auto is dense, and sparse raises SettingsError."""
    refuse_sparse(kind, device)
    if kind == "sparse":
        return SparseStep(precision)
    if kind in ("dense", "compiled") or device.type != "cpu":
        return DenseStep(precision, compiled=kind == "compiled")
    return AdaptiveStep(precision, name=name)


def refuse_sparse(kind: KernelKind, device: torch.device) -> None:
    """Raise SettingsError for the sparse kernel on a device that it cannot compute on."""
    if kind == "sparse" and device.type != "cpu":
        raise SettingsError(f"kernel: sparse runs on CPUs, and the device is {device}; use auto, dense or compiled")


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """Return what ``auto`` means here: bfloat16 where the device multiplies it natively, else float32.

    A CPU without the instructions emulates it several times slower than float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "float32"
