"""What every architecture shares: the parameters, encode, decode, the unit-norm decoder, folding.

Both weight matrices are feature-major, ``(d_sae, width)``: row f is what feature f reads or writes. An architecture
is two classes: its settings, an ``Architecture`` in ``settings.py``, and its module, a ``Transcoder`` in the file that
has the name of its ``kind``. The trainer calls the methods below and nothing else: it has no case for any architecture.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tailrace.storage.display import card
from tailrace.training.architectures.entries import Above, Entries, Selection
from tailrace.training.architectures.objectives import Objective
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.normalisation import AnyNormalisation, Normalisation

SMALLEST_NORM = 1e-12
"""A decoder row below this has no direction; it is left as it is rather than divided by zero."""

_NOT_PER_FEATURE = ("b_dec_out", "b_dec", "W_skip")


class Float32Product(torch.autograd.Function):
    """``rows @ weightsᵀ`` of operands in bfloat16, (n, d) and (m, d) or a batch of such, summed and kept in float32.

    Autocast rounds the sums too. Operands' rounding moves a sum by chance; that of sums puts them on a grid, which at 4
    is 0.03 wide.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the products, float32."""
        rows, weights = rows.bfloat16(), weights.bfloat16()
        ctx.save_for_backward(rows, weights)
        with torch.autocast(rows.device.type, enabled=False):
            if rows.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 and later
                multiply = torch.mm if rows.ndim == 2 else torch.bmm
                return multiply(rows, weights.mT, out_dtype=torch.float32)
            return rows.float() @ weights.float().mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the operands' gradients, of products in bfloat16 as autocast takes them."""
        rows, weights = ctx.saved_tensors
        gradient = gradients[0].bfloat16()
        of_rows = (gradient @ weights).float() if ctx.needs_input_grad[0] else None
        return of_rows, (gradient.mT @ rows).float()


class Trace(NamedTuple):
    """What one forward pass over a batch gave the loss and the bookkeeping."""

    outputs: Tensor
    """(rows, d_out), predicted."""
    activations: Tensor
    """At the entries the pass was given."""
    terms: dict[str, Tensor]
    """Loss terms by name, scalars, already weighted; their sum is the loss."""
    reductions: BatchReductions = ALONE
    """Over the whole batch that the rows are part of."""


class Block(NamedTuple):
    """Features that read the same inputs and write to the same outputs, such as those of one layer of several."""

    features: slice
    inputs: slice
    """The columns of a row of inputs that they read."""
    W_dec: nn.Parameter
    """(features, outputs): what they write."""
    outputs: slice
    """The columns of a row of outputs that they write to."""

    def own(self, features: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which of ``features``, by index, are of this block."""
        own: Tensor = (features >= self.features.start) & (features < self.features.stop)
        return own


class Transcoder(nn.Module, ABC):
    """From an MLP's input to its output through sparse features; an autoencoder if both are the same activations.

    ``b_dec``, subtracted from the inputs, exists only in training and only where the architecture asks for it; with
    ``tied_bias``, ``b_dec_out`` is subtracted instead.
    ``W_skip`` is a linear path past the features (Paulo et al. 2025, "Transcoders beat sparse autoencoders").
    """

    needs_float32: ClassVar[bool] = False
    """Whether pre-activations rounded to bfloat16 teach it something else."""

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
    W_skip: nn.Parameter | None
    """(d_out, d_in) or None."""

    tied_bias: bool = False
    """Whether the output bias is subtracted from the inputs too; never once folded."""

    activation_unit: float = 1.0
    """The objective's: activations are divided by it before a sparsity term or a bandwidth counts them."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, *, input_bias: bool = False, skip: bool = False) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec_out = nn.Parameter(torch.zeros(d_out))
        self.register_parameter("b_dec", nn.Parameter(torch.zeros(d_in)) if input_bias else None)
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(d_out, d_in)) if skip else None)

    @property
    def input_bias(self) -> Tensor | None:
        """What is subtracted from the inputs, (d_in,)."""
        return self.b_dec_out if self.tied_bias else self.b_dec

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

    def sizes(self) -> dict[str, int]:
        """Return what its size is made of, by name; k where the architecture has one."""
        sizes = {"d_in": self.d_in, "d_out": self.d_out, "d_sae": self.d_sae}
        return sizes | ({"k": int(cast(int, self.k))} if hasattr(self, "k") else {})

    def extra_repr(self) -> str:
        """Return the sizes, which torch writes between the parentheses."""
        return ", ".join(f"{name}={size}" for name, size in self.sizes().items())

    def _repr_html_(self) -> str:
        n_weights = sum(parameter.numel() for parameter in self.parameters())
        return card(type(self).__name__, {**self.sizes(), "weights": n_weights, "device": str(self.W_enc.device)})

    # As it is used

    @abstractmethod
    def activate(self, pre_activations: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the activations of pre-activations, as a trained transcoder computes them."""

    def pre_activations(self, inputs: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Return W_enc (x − b_dec) + b_enc."""
        if self.rounds_too_much(inputs):
            rows = inputs.reshape(-1, inputs.shape[-1])
            products: Tensor = Float32Product.apply(rows, self.W_enc)  # type: ignore[no-untyped-call]
            return products.view(*inputs.shape[:-1], -1) + self.encoder_bias()
        return F.linear(inputs, self.W_enc, self.encoder_bias())

    def rounds_too_much(self, inputs: Tensor) -> bool:
        """Tell whether a product with ``inputs`` would be rounded to bfloat16 where that changes what is learnt.

        On a GPU alone: a CPU multiplies bfloat16 into float32 several times more slowly, and there the sparse step,
        which is exact, takes over.
        """
        return self.needs_float32 and inputs.is_cuda and torch.is_autocast_enabled("cuda")

    def encoder_bias(self) -> Tensor:
        """Return b_enc − W_enc b_dec, (d_sae,)."""
        # Subtracting b_dec from every row would cost a sixth matrix product in the backward pass; as part of the bias
        # its gradient is a column sum and a matrix-vector product.
        taken_off = self.input_bias
        if taken_off is None:
            return self.b_enc
        with torch.autocast(self.W_enc.device.type, enabled=False):
            return self.b_enc - self.W_enc @ taken_off

    def pre_activations_of(
        self, features: Int[Tensor, " n"], inputs: Float[Tensor, "*rows d_in"]
    ) -> Float[Tensor, "*rows n"]:
        """Return the pre-activations of features, given by index, alone."""
        rows = self.W_enc.index_select(0, features)
        bias = self.b_enc.index_select(0, features)
        if (taken_off := self.input_bias) is not None:
            bias = bias - rows @ taken_off
        return F.linear(inputs, rows, bias)

    def encode(self, inputs: Float[Tensor, "*rows {self.d_in}"]) -> Float[Tensor, "*rows {self.d_sae}"]:
        """Return the activations of inputs."""
        return self.activate(self.pre_activations(inputs))

    def decode(
        self,
        activations: Float[Tensor, "*rows {self.d_sae}"],
        inputs: Float[Tensor, "*rows {self.d_in}"] | None = None,
        reductions: BatchReductions = ALONE,
    ) -> Float[Tensor, "*rows {self.d_out}"]:
        """Return outputs of activations; a skip transcoder needs the inputs too.

        ``reductions`` are those over all features, of which these may be a slice. Raises ValueError if inputs are
        missing.
        """
        if self.W_skip is not None and inputs is None:
            raise ValueError("this transcoder has a skip path: call decode(activations, inputs), or forward(inputs)")
        return reductions.over_features(activations @ self.W_dec) + self.unexplained(inputs)

    def unexplained(self, inputs: Tensor | None) -> Tensor:
        """Return what is not written by features: the bias, and the skip path's part of inputs (…, d_in)."""
        if self.W_skip is None or inputs is None:
            return self.b_dec_out
        return F.linear(inputs, self.W_skip, self.b_dec_out)

    def forward(self, inputs: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return the predicted outputs of inputs."""
        return self.decode(self.encode(inputs), inputs)

    def selection_in_use(self) -> Selection:
        """Return which pairs a trained transcoder activates; ``activation`` of these entries is ``encode``, sparse."""
        return Above()

    # As it is trained

    def initialise_own(self) -> None:
        """Give the parameters that only this architecture has their first values; zero unless it says otherwise."""

    def restart_own(self, features: Int[Tensor, " n"]) -> None:
        """Give features, by index, the first values of the parameters that only this architecture has."""

    def rows_of(self, features: Int[Tensor, " n"]) -> dict[str, Int[Tensor, " n"]]:
        """Return, for each parameter with a row per feature, where it has those of features, given by index."""
        return {name: features for name, _ in self.named_parameters() if name not in _NOT_PER_FEATURE}

    def blocks(self) -> list[Block]:
        """Return the features in blocks that read the same inputs and write to the same outputs: here all are one."""
        return [Block(slice(0, self.d_sae), slice(0, self.d_in), self.W_dec, slice(0, self.d_out))]

    def unit_rows(self) -> frozenset[str]:
        """Return the names of the parameters whose rows have unit norm: what each feature writes."""
        return frozenset({"W_dec"})

    def become_slice(self, first: int, d_sae: int) -> None:
        """Make these the features from ``first`` on of ``d_sae``, the others of which are in other processes."""

    def begin_step(self, step: int) -> None:
        """Take the settings that change while training to their values in ``step``, counted from 0."""

    def selection(self) -> Selection:
        """Return which pairs can be active or receive a gradient."""
        return Above()

    @abstractmethod
    def activation(self, entries: Entries) -> Float[Tensor, "*pairs"]:
        """Return the activations at entries, shaped as ``entries.pre``: positive where a feature fires, else zero."""

    def trace(self, entries: Entries, batch: Batch, objective: Objective) -> Trace:
        """Return outputs and loss terms of a batch of normalised rows."""
        activations = self.activation(entries)
        written = entries.reductions.over_features(entries.decode(activations, self.W_dec))
        outputs = written + self.unexplained(batch.inputs)
        terms = {"reconstruction": objective.reconstruction(exact(outputs, batch.outputs), batch.outputs)}
        return Trace(outputs, activations, {**terms, **self.penalties(entries, activations)})

    def penalties(self, entries: Entries, activations: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the loss terms besides reconstruction; none unless the architecture has some."""
        return {}

    def end_step(self, activations: Tensor, reductions: BatchReductions = ALONE) -> None:
        """Learn from a step's activations, on rows of one batch, what is not learnt by gradient."""

    @torch.no_grad()
    def constrain_gradients(self, features: slice = slice(None)) -> None:
        """Remove the part of each decoder row's gradient along the row, before the optimiser sees it.

        The norm is put back to one after the step anyway; left in, that part would only fill Adam's moments.
        """
        if self.W_dec.grad is not None:
            gradient, rows = self.W_dec.grad[features], self.W_dec[features]
            gradient.addcmul_((gradient * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def constrain_parameters(self, features: slice = slice(None)) -> None:
        """Bring decoder rows back to unit norm, after the optimiser's step."""
        rows = self.W_dec[features]
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.div_(torch.where(norms > SMALLEST_NORM, norms, torch.ones_like(norms)))

    # Between normalised and raw units

    def scale_activations(self, factor: float) -> None:
        """Multiply by ``factor`` every parameter besides encoder and biases that counts in units of activations."""

    @torch.no_grad()
    def folded(self, normalisation: AnyNormalisation) -> Transcoder:
        """Return a copy on the CPU that takes raw inputs and gives raw outputs; computed in float64.

        The output scale goes into the encoder, which every activation that commutes with a positive factor allows,
        so decoder rows keep unit norm and an activation is the length of what the feature writes.
        """
        assert isinstance(normalisation, Normalisation), "rows are those of one layer"
        raw = copy.deepcopy(self).cpu()
        exactly = normalisation.to(torch.device("cpu"), torch.float64)
        W_enc = raw.W_enc.double() * (exactly.scale_out / exactly.scale_in)
        b_enc = raw.b_enc.double() * exactly.scale_out - W_enc @ exactly.mean_in
        if (taken_off := raw.input_bias) is not None:
            b_enc -= W_enc @ (taken_off.double() * exactly.scale_in)
            raw.b_dec, raw.tied_bias = None, False
        b_dec_out = exactly.restore(raw.b_dec_out.double())
        if raw.W_skip is not None:
            W_skip = raw.W_skip.double() * (exactly.scale_out / exactly.scale_in)
            b_dec_out -= W_skip @ exactly.mean_in
            raw.W_skip.copy_(W_skip)
        raw.W_enc.copy_(W_enc)
        raw.b_enc.copy_(b_enc)
        raw.b_dec_out.copy_(b_dec_out)
        raw.scale_activations(exactly.scale_out)
        return raw

    @torch.no_grad()
    def take_folded(self, raw: Transcoder, normalisation: AnyNormalisation) -> None:
        """Take over the weights of a published transcoder of the same shape: the inverse of ``folded``.

        An input bias starts at zero, whatever it was before folding, or at the output bias if they are tied.
        """
        assert isinstance(normalisation, Normalisation), "rows are those of one layer"
        exactly = normalisation.to(torch.device("cpu"), torch.float64)
        source = copy.deepcopy(raw).cpu()
        W_enc, b_dec_out = source.W_enc.double(), source.b_dec_out.double()
        self.W_enc.copy_(W_enc * (exactly.scale_in / exactly.scale_out))
        self.b_enc.copy_((source.b_enc.double() + W_enc @ exactly.mean_in) / exactly.scale_out)
        if self.W_skip is not None and source.W_skip is not None:
            W_skip = source.W_skip.double()
            b_dec_out = b_dec_out + W_skip @ exactly.mean_in
            self.W_skip.copy_(W_skip * (exactly.scale_in / exactly.scale_out))
        self.W_dec.copy_(source.W_dec)
        self.b_dec_out.copy_(exactly.outputs(b_dec_out))
        if self.tied_bias:  # what is taken off the inputs now, the folded encoder bias had
            b_enc = (source.b_enc.double() + W_enc @ exactly.mean_in) / exactly.scale_out
            self.b_enc.copy_(b_enc + self.W_enc.double() @ self.b_dec_out.double())
        source.scale_activations(1 / exactly.scale_out)
        if self.b_dec is not None:
            self.b_dec.zero_()
        shared = {"W_enc", "b_enc", "W_dec", "b_dec_out", "W_skip", "b_dec"}
        own = self.state_dict()
        for name, value in source.state_dict().items():
            if name not in shared:
                own[name].copy_(value)


def exact(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` in the dtype of ``like``: losses are summed in float32 even under autocast."""
    return values.to(like.dtype)
