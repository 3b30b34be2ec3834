"""Gated features: one set of pre-activations decides what fires, a rescaled copy of it says how strongly.

The penalty shrinks only the gate, so magnitudes are not pulled towards zero (Rajamanoharan et al. 2024, "Improving
dictionary learning with gated sparse autoencoders", section 3.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tailrace.training.architectures.base import Trace, Transcoder, exact
from tailrace.training.architectures.entries import Entries
from tailrace.training.architectures.objectives import Objective
from tailrace.training.architectures.relu import total
from tailrace.training.architectures.schedule import warmed_up
from tailrace.training.architectures.settings import Gated
from tailrace.training.rows.batches import Batch


class GatedTranscoder(Transcoder):
    """``1[π > 0] · max(0, exp(r) π + b_mag)`` with gates ``π = W_enc x + b_enc``.

    The paper writes magnitudes as exp(r) (W_enc x) + b; its b is ``b_mag`` + exp(r) b_enc here, the same functions.
    Loss terms: ``sparsity``, l1 · mean over rows of the summed positive gates, and ``gate``, the reconstruction from
    them with the decoder held fixed, which teaches gates without moving the decoder.
    """

    r_mag: nn.Parameter
    """(d_sae,)."""
    b_mag: nn.Parameter
    """(d_sae,)."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, settings: Gated) -> None:
        super().__init__(d_in, d_out, d_sae, input_bias=settings.input_bias, skip=settings.skip)
        self._settings = settings
        self.l1 = settings.l1
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    @torch.no_grad()
    def restart_own(self, features: Int[Tensor, " n"]) -> None:
        """Make magnitudes of features equal to their gates."""
        self.r_mag[features] = 0
        self.b_mag[features] = 0

    def begin_step(self, step: int) -> None:
        """Raise l1 linearly from zero over its warm-up."""
        self.l1 = self._settings.l1 * warmed_up(step, self._settings.l1_warmup_steps)

    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the magnitudes of features whose gate is open."""
        magnitudes = (pre_activations * self.r_mag.exp() + self.b_mag).relu()
        return magnitudes * (pre_activations > 0)

    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the magnitudes where the gate is open; the gate itself passes no gradient."""
        magnitudes = (entries.pre * entries.at(self.r_mag.exp()) + entries.at(self.b_mag)).relu()
        return magnitudes * (entries.pre > 0)

    def trace(self, entries: Entries, batch: Batch, objective: Objective) -> Trace:
        """Return outputs and loss terms, those of the gates included."""
        gated = super().trace(entries, batch, objective)
        gates = entries.pre.relu()
        constant = self.unexplained(batch.inputs).detach()
        from_gates = entries.reductions.over_features(entries.decode(gates, self.W_dec.detach())) + constant
        gates = gates.float() if gates.dtype == torch.bfloat16 else gates
        terms = {
            **gated.terms,
            "sparsity": entries.reductions.over_features(total(gates))
            * (self.l1 / self.activation_unit / entries.n_rows),
            "gate": objective.reconstruction(exact(from_gates, batch.outputs), batch.outputs),
        }
        return gated._replace(terms=terms)

    @torch.no_grad()
    def scale_activations(self, factor: float) -> None:
        """Scale the magnitudes' bias with the activations."""
        self.b_mag.mul_(factor)


def build(settings: Gated, d_in: int, d_out: int, d_sae: int) -> GatedTranscoder:
    """Return the module with all weights zero."""
    return GatedTranscoder(d_in, d_out, d_sae, settings=settings)
