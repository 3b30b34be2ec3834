"""Which kernel computes a step: a function of settings, device and the number of features that fired.

Of time only once on a GPU, where what was chosen is kept. So a run that is resumed takes the same kernel for every step
as one that was not.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above
from tailrace.training.architectures.objectives import Objective
from tailrace.training.choices import KernelKind
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepKernel, StepResult, suits_sparse
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

if TYPE_CHECKING:
    from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep

logger = logging.getLogger(__name__)


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
        self.is_sparse = suits_sparse(density, before)
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


def build_kernel(
    kind: KernelKind,
    precision: Precision,
    device: torch.device,
    *,
    name: str,
    fused: bool = False,
    sparse: Callable[[Precision], StepKernel] = SparseStep,
    sparse_on_gpu: Callable[[DeviceGradients], DeviceStep] | None = None,
) -> StepKernel:
    """Return the kernel of a run; ``sparse`` and ``sparse_on_gpu`` make sparse steps, by default those of one layer.

    ``fused``: whether the optimiser takes gradients as a GPU's sparse step leaves them. Raises SettingsError for the
    sparse kernel on a device that has none.
    """
    if kind in ("dense", "compiled"):
        return DenseStep(precision, compiled=kind == "compiled")
    if device.type == "cpu":
        step = sparse(precision)
        return step if kind == "sparse" else AdaptiveStep(precision, name=name, sparse=step)
    missing = missing_for_sparse(device)
    if missing is None:
        # triton is optional
        from tailrace.training.kernels.device.choice import build_choice

        return build_choice(precision, sparse_on_gpu, name=name, fused=fused, prove=kind == "auto")
    if kind == "sparse":
        raise SettingsError(f"kernel: sparse: {missing}; or use auto or dense")
    if device.type == "cuda":
        logger.info("%s: steps are dense: %s", name, missing)
    return DenseStep(precision)


def missing_for_sparse(device: torch.device) -> str | None:
    """Return what the sparse step lacks on a device other than the CPU, as a sentence; None for nothing."""
    if device.type != "cuda":
        return f"the sparse step runs on CPUs and CUDA GPUs, and the device is {device}"
    if importlib.util.find_spec("triton") is None:
        return "the sparse step of a GPU is written in Triton, which is not installed (pip install triton)"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # whatever a package that does not fit this Python, torch or driver may raise
        return (
            "the sparse step of a GPU is written in Triton, which is installed and cannot be imported "
            f"({type(error).__name__}: {error}); install the release that your torch names (pip show torch)"
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "the sparse step needs a GPU that multiplies bfloat16, of compute capability 8.0 or later"
    return None


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
