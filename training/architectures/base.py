"""What every architecture shares: the parameters, encode, decode, the unit-norm decoder, folding.

Both weight matrices are feature-major, ``(d_sae, width)``: row f is what feature f reads or writes. An architecture
is two classes in one file: its settings (an ``Architecture``) and its module (a ``Transcoder``). The trainer calls the
methods below and nothing else, so it has no case for any architecture.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.settings import Settings
from training.normalisation import Normalisation

SMALLEST_NORM = 1e-12
"""A decoder row below this has no direction; it is left as it is rather than divided by zero."""


class Trace(NamedTuple):
    """What one forward pass over rows gave the loss and the bookkeeping."""

    outputs: Tensor
    """(rows, d_out), predicted."""
    n_active: Tensor
    """(d_sae,) int64: on how many of the rows each feature fired."""
    penalties: dict[str, Tensor]
    """The architecture's own loss terms by name, scalars, already weighted."""


class Transcoder(nn.Module, ABC):
    """From an MLP's input to its output through sparse features; an autoencoder if both are the same activations.

    ``b_dec``, subtracted from the inputs, exists only in training and only where the architecture asks for it.
    """

    W_enc: nn.Parameter
    """(d_sae, d_in)."""
    b_enc: nn.Parameter
    """(d_sae,)."""
    W_dec: nn.Parameter
    """(d_sae, d_out), rows of unit norm."""
    b_dec_out: nn.Parameter
    """(d_out,)."""
    b_dec: nn.Parameter | None
    """(d_in,) or None."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, input_bias: bool = False) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec_out = nn.Parameter(torch.zeros(d_out))
        self.register_parameter("b_dec", nn.Parameter(torch.zeros(d_in)) if input_bias else None)

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the outputs."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    @abstractmethod
    def activate(self, pre_activations: Tensor) -> Tensor:
        """Return the activations (…, d_sae) of pre-activations (…, d_sae); both zero or positive where they fire."""

    def pre_activations(self, inputs: Tensor) -> Tensor:
        """Return W_enc (x − b_dec) + b_enc, (…, d_sae)."""
        return F.linear(inputs, self.W_enc, self._encoder_bias())

    def _encoder_bias(self) -> Tensor:
        # Subtracting b_dec from every row would cost a sixth matrix product in the backward pass; as part of the bias
        # its gradient is a column sum and a matrix-vector product.
        if self.b_dec is None:
            return self.b_enc
        with torch.autocast(self.W_enc.device.type, enabled=False):
            return self.b_enc - self.W_enc @ self.b_dec

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the activations (…, d_sae) of inputs (…, d_in)."""
        return self.activate(self.pre_activations(inputs))

    def decode(self, activations: Tensor) -> Tensor:
        """Return outputs (…, d_out) of activations (…, d_sae)."""
        return activations @ self.W_dec + self.b_dec_out

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the predicted outputs (…, d_out) of inputs (…, d_in)."""
        return self.decode(self.encode(inputs))

    def trace(self, inputs: Tensor, activation_unit: float = 1.0) -> Trace:
        """Run rows (rows, d_in) as training sees them; ``activation_unit`` is the objective's."""
        activations = self.encode(inputs)
        n_active = (activations.detach() > 0).sum(0)
        return Trace(self.decode(activations), n_active, self.penalties(activations, activation_unit))

    def penalties(self, activations: Tensor, activation_unit: float) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the loss terms besides reconstruction; none unless the architecture has some."""
        return {}

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Remove the part of each decoder row's gradient along the row, before the optimiser sees it.

        The norm is put back to one after the step anyway; left in, that part would only fill Adam's moments.
        """
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def constrain_parameters(self) -> None:
        """Bring every decoder row back to unit norm, after the optimiser's step."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norms > SMALLEST_NORM, norms, torch.ones_like(norms)))

    @torch.no_grad()
    def folded(self, normalisation: Normalisation) -> Self:
        """Return a copy on the CPU that takes raw inputs and gives raw outputs; computed in float64.

        The output scale goes into the encoder, which every activation that commutes with a positive factor allows,
        so decoder rows keep unit norm and an activation is the length of what the feature writes.
        """
        raw = copy.deepcopy(self).cpu()
        exact = normalisation.to(torch.device("cpu"), torch.float64)
        W_enc = raw.W_enc.double() * (exact.scale_out / exact.scale_in)
        b_enc = raw.b_enc.double() * exact.scale_out - W_enc @ exact.mean_in
        if raw.b_dec is not None:
            b_enc -= W_enc @ (raw.b_dec.double() * exact.scale_in)
            raw.b_dec = None
        raw.W_enc.copy_(W_enc)
        raw.b_enc.copy_(b_enc)
        raw.b_dec_out.copy_(exact.restore(raw.b_dec_out.double()))
        return raw


class Architecture(Settings, ABC):
    """Settings of one architecture. A subclass adds ``kind: Literal[…]``, by which files and flags name it."""

    @abstractmethod
    def build(self, d_in: int, d_out: int, d_sae: int) -> Transcoder:
        """Return the module with all weights zero; ``training.initialise`` fills them."""

    def problems(self, d_sae: int) -> list[str]:  # noqa: ARG002
        """Return a sentence for every setting that does not fit ``d_sae`` features."""
        return []
