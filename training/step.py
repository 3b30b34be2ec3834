"""Loss and gradients of one batch. A kernel may compute them as it likes; ``AutogradStep`` is the one to agree with.

A kernel leaves gradients in ``.grad`` and changes no weight: constraints, clipping and the optimiser come after it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from training.architectures.base import Transcoder
from training.batches import Batch
from training.objectives import Objective

Precision = Literal["float32", "bfloat16"]


class StepResult(NamedTuple):
    """What a kernel reports besides the gradients."""

    losses: dict[str, Tensor]
    """Scalars by name, detached: ``loss`` is the total, the sum of ``reconstruction`` and the architecture's."""
    n_active: Tensor
    """(d_sae,) int64: on how many rows of the batch each feature fired."""


class StepKernel(Protocol):
    """Forward pass, loss and gradients."""

    def __call__(self, transcoder: Transcoder, batch: Batch, objective: Objective) -> StepResult:
        """Set ``.grad`` of every parameter to the gradient of the loss on ``batch`` (normalised rows)."""
        ...


class AutogradStep:
    """Plain autograd, dense gradients; matrix products in bfloat16 if asked for, the loss always in float32."""

    def __init__(self, precision: Precision = "float32") -> None:
        self._autocast = precision == "bfloat16"

    def __call__(self, transcoder: Transcoder, batch: Batch, objective: Objective) -> StepResult:
        """Set ``.grad`` of every parameter and return the loss terms."""
        transcoder.zero_grad(set_to_none=True)
        with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            trace = transcoder.trace(batch.inputs, objective.activation_unit)
        terms = {
            "reconstruction": objective.reconstruction(trace.outputs.to(batch.outputs.dtype), batch.outputs),
            **trace.penalties,
        }
        total = torch.stack([*terms.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return StepResult(
            {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}, trace.n_active
        )


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
