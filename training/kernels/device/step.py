"""The step at active pairs only, on a GPU: exact, without a wait, gradients as sums over pairs.

As the CPU's (``tailrace.training.kernels.sparse``), with two differences. Sizes are fixed before the step, so it says
what does not fit instead of making room; such a step changes no weight. And gradients of weight matrices stay what they
are made of where the optimiser takes them so (``DeviceGradients.fused``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, Entries, Selection
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.device.pairs import DeviceEntries, DevicePairs, PairGradient
from tailrace.training.kernels.device.screen import Screen
from tailrace.training.kernels.kernel import ExtraLoss, StepResult, finish
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch

ROOM = 4
"""Candidates of a selection of the largest that there are slots for, in times those selected: 1.5 to 2.5 are usual."""


class DeviceGradients:
    """What the step leaves to the optimiser besides ``.grad``."""

    def __init__(self, *, fused: bool = False) -> None:
        self.fused = fused
        """Whether gradients at pairs are left as they are; else they are added to ``.grad``."""
        self.trusted = False
        """Whether the programs were proven right; else the optimiser uses torch's operators."""
        self.at_pairs: dict[str, PairGradient] = {}
        """By parameter."""
        self.screen = Screen()
        self.overflow: Tensor | None = None
        """int32 (1,): not zero after a step whose pairs did not fit."""
        self.n_candidates: Tensor | None = None
        """int32 scalar: the pairs of the latest step that were wanted room for."""

    def take(self, transcoder: Transcoder, name: str, gradient: PairGradient) -> None:
        """Keep a gradient at pairs, or add it to ``.grad``."""
        if self.fused and name not in self.at_pairs:
            self.at_pairs[name] = gradient
            return
        parameter = transcoder.get_parameter(name)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient.add_to(parameter.grad)


class DeviceStep:
    """For transcoders of one layer on a GPU. What screens is bfloat16, all else float32, whatever the precision."""

    def __init__(self, gradients: DeviceGradients | None = None) -> None:
        self.gradients = gradients or DeviceGradients()
        self.n_slots: int | None = None
        """Room for pairs; None: as much as the selection is likely to need."""

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
        transcoder.zero_grad(set_to_none=True)
        kept = self.gradients
        kept.at_pairs.clear()
        if kept.overflow is None:
            kept.overflow = torch.zeros(1, dtype=torch.int32, device=batch.inputs.device)
        entries = self._entries(transcoder, batch, reductions)
        trace = transcoder.trace(entries, batch, objective)
        result = finish(transcoder, entries, trace, batch, extra, per_row=per_row)
        if reductions is not ALONE:  # where pairs did not fit, no process takes the step
            kept.overflow.copy_(reductions.of_all(kept.overflow))
        if not kept.fused:
            self._drop_gradients_without_room(transcoder)
        return result

    def _drop_gradients_without_room(self, transcoder: Transcoder) -> None:
        """Zero the gradients where pairs did not fit."""
        kept = self.gradients
        assert kept.overflow is not None, "made when the step begins"
        gradients = [value.grad for value in transcoder.parameters() if value.grad is not None]
        torch._foreach_mul_(gradients, (kept.overflow == 0).float()[0])

    def _entries(self, transcoder: Transcoder, batch: Batch, reductions: BatchReductions) -> Entries:
        inputs = batch.inputs.contiguous()
        pairs, pre = self._select(transcoder, inputs[None], reductions)
        return DeviceEntries(pairs, pre, transcoder, inputs, partial(self.gradients.take, transcoder), reductions)

    def _select(
        self, transcoder: Transcoder, inputs: Tensor, reductions: BatchReductions
    ) -> tuple[DevicePairs, Tensor]:
        """Return the pairs of ``inputs`` (layers, rows, width) and their pre-activations."""
        kept, selection = self.gradients, transcoder.selection()
        assert kept.overflow is not None, "made when the step begins"
        n_slots = self.n_slots or slots_for(selection, inputs.shape[1], transcoder.d_sae)
        bias = transcoder.encoder_bias()
        pairs, pre = kept.screen.select(inputs, transcoder.W_enc, bias, selection, kept.overflow, n_slots, reductions)
        kept.n_candidates = pairs.ends[-1]
        return pairs, pre


def slots_for(selection: Selection, n_rows: int, d_sae: int, density: float = 1.0) -> int:
    """Return room for the candidates of a selection; ``density`` is the share of pairs that are likely to be active."""
    most = n_rows * d_sae
    wanted = 2 * density * most if isinstance(selection, Above) else ROOM * selection.k * n_rows
    return max(1, min(most, 1 << max(6, int(wanted) - 1).bit_length()))
