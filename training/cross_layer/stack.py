"""A stack of layers as one transcoder: a feature reads one layer's MLP and writes to its output and all later ones.

(Ameisen et al. 2025, "Circuit tracing", section 2; Lindsey et al. 2024, "Sparse crosscoders".) A row is a token at all
layers at once: inputs lie side by side, (rows, n_layers · width_in), and so do outputs. To training it is a transcoder
with a block-diagonal encoder and a block-triangular decoder; only the products know of the blocks. Which features fire
is the affair of the architecture that a stack is combined with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailrace.training.architectures import Architecture, BatchTopK, JumpReLU, ReLU
from tailrace.training.architectures.base import SMALLEST_NORM, Block, Float32Product, Trace, Transcoder, exact
from tailrace.training.architectures.batch_topk import BatchTopKTranscoder
from tailrace.training.architectures.entries import Entries, LargestOfBatch
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.architectures.relu import ReLUTranscoder
from tailrace.training.rows.batch_reductions import ALONE, BatchReductions
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.normalisation import AnyNormalisation, JoinedNormalisation, Normalisation

DECODER = "W_dec_"
"""Decoders are called this and the number of the layer they read."""


class Stack(Transcoder):
    """The blocks. ``d_sae`` counts the features of all layers: feature f reads layer f // features_per_layer."""

    def _become_stack(self, n_layers: int, width_in: int, width_out: int) -> None:
        """Replace the decoder of a plain transcoder, built with ``d_out`` 1, by one for every layer."""
        self.n_layers, self.width_in, self.width_out = n_layers, width_in, width_out
        del self.W_dec
        for layer in range(n_layers):
            n_written = (n_layers - layer) * width_out
            self.register_parameter(f"{DECODER}{layer}", nn.Parameter(torch.zeros(self.features_per_layer, n_written)))
        self.b_dec_out = nn.Parameter(torch.zeros(n_layers * width_out))

    @property
    def features_per_layer(self) -> int:
        """Number of features that read one layer."""
        return self.W_enc.shape[0] // self.n_layers

    @property
    def d_in(self) -> int:
        """Width of a row of inputs: of all layers."""
        return self.n_layers * self.width_in

    @property
    def d_out(self) -> int:
        """Width of a row of outputs: of all layers."""
        return self.n_layers * self.width_out

    def sizes(self) -> dict[str, int]:
        """Return the number of layers, the widths of each, and the features that read one."""
        return {
            "layers": self.n_layers,
            "d_in": self.width_in,
            "d_out": self.width_out,
            "features_per_layer": self.features_per_layer,
        }

    def of_layer(self, layer: int) -> slice:
        """Return the features that read a layer. Layers count from 0 within the stack, here and everywhere below.

        Raises IndexError for a layer that is none of them.
        """
        if not 0 <= layer < self.n_layers:
            raise IndexError(
                f"layer {layer}: this stack has {self.n_layers}, which count from 0 whatever their numbers in the model"
            )
        return slice(layer * self.features_per_layer, (layer + 1) * self.features_per_layer)

    def decoder(self, layer: int) -> nn.Parameter:
        """Return what a layer's features write, (features_per_layer, (n_layers − layer) · width_out), unit rows.

        The outputs of layers ``layer``, ``layer`` + 1, … lie side by side.
        """
        return self.get_parameter(f"{DECODER}{layer}")

    def writes(self, source: int, target: int) -> Tensor:
        """Return (features_per_layer, width_out): what features that read ``source`` write to layer ``target``.

        Raises IndexError for a layer that is none of the stack's, ValueError for a target before the source.
        """
        self.of_layer(source), self.of_layer(target)
        if target < source:
            raise ValueError(f"features of layer {source} write to it and later layers, not to layer {target}")
        start = (target - source) * self.width_out
        return self.decoder(source)[:, start : start + self.width_out]

    # As it is used

    def pre_activations(self, inputs: Tensor) -> Tensor:
        """Return (…, d_sae) of inputs (…, d_in): each layer's encoder on its own part."""
        rows = inputs.reshape(-1, self.n_layers, self.width_in)
        encoders = self.W_enc.view(self.n_layers, self.features_per_layer, self.width_in)
        biases = self.b_enc.view(self.n_layers, 1, self.features_per_layer)
        if self.rounds_too_much(inputs):
            products: Tensor = Float32Product.apply(rows.transpose(0, 1), encoders)  # type: ignore[no-untyped-call]
            pre = biases + products
        else:
            pre = torch.baddbmm(biases, rows.transpose(0, 1), encoders.transpose(1, 2))
        return pre.transpose(0, 1).reshape(*inputs.shape[:-1], self.d_sae)

    def layer_pre_activations(self, layer: int, inputs: Tensor) -> Tensor:
        """Return (…, features_per_layer) of one layer's inputs (…, width_in)."""
        own = self.of_layer(layer)
        return nn.functional.linear(inputs, self.W_enc[own], self.b_enc[own])

    def decode(
        self,
        activations: Tensor,
        inputs: Tensor | None = None,  # noqa: ARG002
        reductions: BatchReductions = ALONE,
    ) -> Tensor:
        """Return outputs (…, d_out) of activations (…, d_sae)."""
        rows = activations.reshape(-1, self.d_sae)
        outputs = self._written(
            len(rows), lambda layer: rows[:, self.of_layer(layer)] @ self.decoder(layer), reductions
        )
        return outputs.view(*activations.shape[:-1], self.d_out)

    def _written(self, n_rows: int, by_layer: Callable[[int], Tensor], reductions: BatchReductions) -> Tensor:
        """Return outputs (rows, d_out); ``by_layer`` gives what one layer's features write, as wide as its decoder."""
        parts = (by_layer(layer) for layer in range(self.n_layers))
        written: Tensor = _AddUp.apply(reductions.once(self.b_dec_out), n_rows, *parts)  # type: ignore[no-untyped-call]
        return reductions.over_features(written)

    # As it is trained

    def unit_rows(self) -> frozenset[str]:
        """Return the names of the decoders."""
        return frozenset(f"{DECODER}{layer}" for layer in range(self.n_layers))

    def blocks(self) -> list[Block]:
        """Return the features of each layer, which read it and write to it and to all later ones."""
        return [
            Block(
                self.of_layer(layer),
                slice(layer * self.width_in, (layer + 1) * self.width_in),
                self.decoder(layer),
                slice(layer * self.width_out, self.d_out),
            )
            for layer in range(self.n_layers)
        ]

    def rows_of(self, features: Tensor) -> dict[str, Tensor]:
        """Return the same; a decoder has rows of its own layer's features alone."""
        of_decoders = {
            f"{DECODER}{layer}": features[block.own(features)] - block.features.start
            for layer, block in enumerate(self.blocks())
        }
        return {**super().rows_of(features), **of_decoders}

    def trace(self, entries: Entries, batch: Batch, objective: Objective) -> Trace:
        """Return outputs and loss terms of a batch of normalised rows, from dense entries."""
        activations = self.activation(entries)
        by_layer = partial(_decode_part, self, entries, activations)
        outputs = self._written(len(batch.inputs), by_layer, entries.reductions)
        terms = {"reconstruction": objective.reconstruction(exact(outputs, batch.outputs), batch.outputs)}
        return Trace(outputs, activations, {**terms, **self.penalties(entries, activations)})

    @torch.no_grad()
    def constrain_gradients(self, features: slice = slice(None)) -> None:
        """Remove the part of each decoder row's gradient along the row."""
        assert features == slice(None), "a stack is constrained as a whole"
        for layer in range(self.n_layers):
            rows = self.decoder(layer)
            if rows.grad is not None:
                rows.grad.addcmul_((rows.grad * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def constrain_parameters(self, features: slice = slice(None)) -> None:
        """Bring decoder rows back to unit norm over all layers they write to."""
        assert features == slice(None), "a stack is constrained as a whole"
        for layer in range(self.n_layers):
            rows = self.decoder(layer)
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.div_(torch.where(norms > SMALLEST_NORM, norms, torch.ones_like(norms)))

    @abstractmethod
    def thresholds(self) -> Tensor:
        """Return (d_sae,): above which pre-activation a feature fires in use."""

    @torch.no_grad()
    def folded(self, normalisation: AnyNormalisation) -> CrossLayerTranscoder:
        """Return a copy on the CPU that takes and gives raw activations; computed in float64.

        What a feature writes to layer m is multiplied by that layer's output scale; its length over all layers then
        goes from the decoder into the encoder, so that decoder rows have unit norm again.
        """
        layers = _layers_of(normalisation)
        raw = CrossLayerTranscoder(self.n_layers, self.width_in, self.width_out, self.features_per_layer)
        scales = self._scales_out(layers)
        thresholds = _exactly(self.thresholds())
        for layer, units in enumerate(
            layers
        ):  # a layer at a time: here or on its device, a whole copy could be too much
            own = self.of_layer(layer)
            written = _exactly(self.decoder(layer)) * scales[layer * self.width_out :]
            lengths = _lengths(written)
            raw.decoder(layer).copy_(written / lengths[:, None])
            W_enc = _exactly(self.W_enc[own]) * (lengths[:, None] / units.scale_in)
            raw.W_enc[own] = W_enc.float()
            raw.b_enc[own] = (_exactly(self.b_enc[own]) * lengths - W_enc @ _exactly(units.mean_in)).float()
            raw.log_threshold[own] = (thresholds[own] * lengths).log().float()  # -inf for a threshold of zero
        raw.b_dec_out.copy_(normalisation.restore(_exactly(self.b_dec_out)))
        return raw.eval()

    @torch.no_grad()
    def take_folded(self, raw: Transcoder, normalisation: AnyNormalisation) -> None:
        """Take over the weights of a published cross-layer transcoder of the same sizes: the inverse of ``folded``."""
        assert isinstance(raw, CrossLayerTranscoder), "it was checked that both are of several layers"
        layers = _layers_of(normalisation)
        scales = self._scales_out(layers)
        thresholds = _exactly(raw.thresholds())
        for layer, units in enumerate(layers):
            own = self.of_layer(layer)
            written = _exactly(raw.decoder(layer)) / scales[layer * self.width_out :]
            lengths = _lengths(written)
            self.decoder(layer).copy_(written / lengths[:, None])
            W_enc = _exactly(raw.W_enc[own])
            b_enc = (_exactly(raw.b_enc[own]) + W_enc @ _exactly(units.mean_in)) * lengths
            self.W_enc[own] = (W_enc * (lengths[:, None] * units.scale_in)).to(self.W_enc)
            self.b_enc[own] = b_enc.to(self.b_enc)
            thresholds[own] *= lengths
        self.b_dec_out.copy_(normalisation.outputs(_exactly(raw.b_dec_out)))
        self.take_thresholds(thresholds)

    @abstractmethod
    def take_thresholds(self, thresholds: Tensor) -> None:
        """Set what ``thresholds`` returns, from float64 (d_sae,) on the CPU."""

    def _scales_out(self, layers: Sequence[Normalisation]) -> Tensor:
        """Return the output scale of every column of ``d_out``, float64."""
        scales = torch.tensor([units.scale_out for units in layers], dtype=torch.float64)
        return scales.repeat_interleave(self.width_out)


def _layers_of(normalisation: AnyNormalisation) -> Sequence[Normalisation]:
    assert isinstance(normalisation, JoinedNormalisation), "a stack learns from rows of several layers"
    return normalisation.layers


def _lengths(rows: Tensor) -> Tensor:
    """Return the norm of each row, 1 for one that has no direction."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(norms > SMALLEST_NORM, norms, torch.ones_like(norms))


def _exactly(values: Tensor) -> Tensor:
    """Return ``values`` on the CPU in float64."""
    return values.detach().cpu().double()


class _AddUp(torch.autograd.Function):
    """A bias (d_out,) in every row, and parts (rows, at most d_out) added to its last columns.

    Added in place one after another, autograd would copy the whole gradient for each part.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, n_rows: int, *parts: Tensor) -> Tensor:
        ctx.kinds = [(part.shape[1], part.dtype) for part in parts]
        outputs = bias.expand(n_rows, -1).clone()
        for part in parts:
            outputs[:, -part.shape[1] :].add_(part)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_parts = (gradient[:, -width:].to(kind) for width, kind in ctx.kinds)
        return gradient.sum(0), None, *of_parts


class StackedEntries(Entries):
    """Entries that know which layer each belongs to."""

    @abstractmethod
    def decode_layer(self, values: Tensor, layer: int, decoder: Tensor) -> Tensor:
        """Return what one layer's ``values`` (as ``pre``, of all layers) write by its decoder, (rows, its width)."""

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:  # noqa: ARG002
        """Raise AssertionError: there is no one decoder."""
        raise AssertionError("a stack is decoded layer by layer")

    def decode_groups(self, values: Tensor, W_dec: Tensor, ends: Sequence[int]) -> Tensor:  # noqa: ARG002
        """Raise AssertionError, likewise."""
        raise AssertionError("a stack is decoded layer by layer")


def _decode_part(stack: Stack, entries: Entries, values: Tensor, layer: int) -> Tensor:
    if isinstance(entries, StackedEntries):
        return entries.decode_layer(values, layer, stack.decoder(layer))
    return values[:, stack.of_layer(layer)] @ stack.decoder(layer)


class CrossLayerTranscoder(Stack, JumpReLUTranscoder):
    """``p · 1[p > θ]`` with a threshold per feature: what every stack becomes when it is published.

    On raw activations, decoder rows of unit norm over all layers they write to; an activation is the length of all
    that its feature writes. ``settings.target_l0`` is the mean of a layer, as k is, and ``l0`` weighs that mean, as the
    reconstruction is the mean of the layers' FVU.
    """

    def __init__(
        self, n_layers: int, width_in: int, width_out: int, features_per_layer: int, *, settings: JumpReLU | None = None
    ) -> None:
        chosen = settings or JumpReLU()
        if chosen.target_l0 is None:
            chosen = chosen.model_copy(update={"l0": chosen.l0 / n_layers})
        else:
            chosen = chosen.model_copy(update={"target_l0": chosen.target_l0 * n_layers})
        JumpReLUTranscoder.__init__(self, width_in, 1, n_layers * features_per_layer, settings=chosen)
        self._become_stack(n_layers, width_in, width_out)

    def thresholds(self) -> Tensor:
        """Return θ."""
        return self.threshold.detach()

    def take_thresholds(self, thresholds: Tensor) -> None:
        """Take them as they are."""
        self.log_threshold.copy_(thresholds.log())

    def encode_layer(self, layer: int, inputs: Tensor) -> Tensor:
        """Return the activations (…, features_per_layer) of one layer's inputs (…, width_in)."""
        pre = self.layer_pre_activations(layer, inputs)
        return pre * (pre > self.threshold[self.of_layer(layer)])


class BatchTopKStack(Stack, BatchTopKTranscoder):
    """The k · n_layers · rows largest pre-activations of a batch, of all layers together."""

    def __init__(
        self, n_layers: int, width_in: int, width_out: int, features_per_layer: int, *, settings: BatchTopK
    ) -> None:
        BatchTopKTranscoder.__init__(self, width_in, 1, n_layers * features_per_layer, settings=settings)
        self._become_stack(n_layers, width_in, width_out)

    def selection(self) -> LargestOfBatch:
        """Return the largest of all layers together: k a layer on average, more where more is needed."""
        return LargestOfBatch(self.k * self.n_layers)

    def thresholds(self) -> Tensor:
        """Return the one learnt along."""
        return self.threshold.expand(self.d_sae)

    def take_thresholds(self, thresholds: Tensor) -> None:
        """Take their mean: those of a stack of this kind are one number to rounding."""
        self.threshold.copy_(thresholds.mean())


class ReLUStack(Stack, ReLUTranscoder):
    """Positive pre-activations, held sparse by a penalty.

    ``settings.l1`` weighs the mean of a layer. Activations are counted in the typical length of all layers' outputs,
    √n_layers of one layer's, so their sum over all layers is √n_layers of that mean.
    """

    def __init__(
        self, n_layers: int, width_in: int, width_out: int, features_per_layer: int, *, settings: ReLU
    ) -> None:
        chosen = settings.model_copy(update={"input_bias": False, "l1": settings.l1 / n_layers**0.5})
        ReLUTranscoder.__init__(self, width_in, 1, n_layers * features_per_layer, settings=chosen)
        self._become_stack(n_layers, width_in, width_out)

    def thresholds(self) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self.b_enc)

    def take_thresholds(self, thresholds: Tensor) -> None:
        """Leave them out: there are none."""


StackArchitecture = BatchTopK | JumpReLU | ReLU
"""The architectures whose features fire by a threshold in use, which is what a published stack has."""


def build_stack(architecture: Architecture, n_layers: int, width_in: int, width_out: int, d_sae: int) -> Stack:
    """Return the stack of an architecture with all weights zero; ``d_sae`` features read each layer."""
    sizes = (n_layers, width_in, width_out, d_sae)
    match architecture:
        case BatchTopK():
            return BatchTopKStack(*sizes, settings=architecture)
        case JumpReLU():
            return CrossLayerTranscoder(*sizes, settings=architecture)
        case ReLU():
            return ReLUStack(*sizes, settings=architecture)
        case _:
            raise AssertionError(f"no stack is made of {architecture!r}")
