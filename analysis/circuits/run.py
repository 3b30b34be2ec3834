"""A forward pass with attention patterns and norm scales held fixed, as plain tensors.

A *probe* is a linear quantity of the pass: a direction at a point of a layer and a token, and a constant. Every
quantity that is explained is a probe, and explaining it gives a further probe for each node that reads the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.weights.model_weights import LayerWeights, ModelWeights
from tailrace.training.architectures.transcoder import Transcoder
from tailrace.training.cross_layer.layers import StackedLayer


class Part(StrEnum):
    """Point of a layer at which a probe reads."""

    PRE = "resid_pre"
    """The stream as it enters the layer; as it leaves the last layer for layer = number of layers."""
    MID = "resid_mid"
    """The stream that the layer's MLP reads; the same as PRE where MLP and attention are parallel."""
    OUT = "mlp_out"
    """The MLP's own output, before any norm behind it."""


@dataclass(frozen=True, eq=False)
class Probe:
    """The quantity ``vector · activation + constant``, of the activation at a point and token of a pass."""

    layer: int
    part: Part
    token: int
    vector: Tensor
    """(d_model,)."""
    constant: float = 0.0

    def plus(self, other: Probe) -> Probe:
        """Return the sum of two quantities of the same activation."""
        assert (self.layer, self.part, self.token) == (other.layer, other.part, other.token)
        return Probe(self.layer, self.part, self.token, self.vector + other.vector, self.constant + other.constant)


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The features of one layer that fire on a pass, sorted by token, and what the transcoder misses."""

    transcoder: Transcoder
    inputs: Tensor
    """(T, d_in) the transcoder's input."""
    reads_stream: bool
    """Whether that is the stream itself, as for some cross-layer transcoders, and not the MLP's norm of it."""
    token: Tensor
    """(n_active,) int64, ascending."""
    feature: Tensor
    """(n_active,) int64, ascending within a token."""
    activation: Tensor
    """(n_active,)."""
    slope: Tensor
    """(n_active,) what the activation gains per unit of the pre-activation; 1 for all but gated features."""
    offset: Tensor
    """(n_active,) activation − slope · pre-activation."""
    starts: Tensor
    """(T + 1,) int64: token t's are those from ``starts[t]`` to ``starts[t + 1]``; on the CPU."""
    error: Tensor
    """(T, d_out) the MLP's recorded output less all that features write to it, zero where none stands in."""
    skip: Tensor | None
    """(T, d_out) what its skip path writes, zero where it does not stand in; None without a skip path."""

    @property
    def n_active(self) -> int:
        """Number of (token, feature) pairs that fire."""
        return int(self.feature.numel())

    def writes(self, source: int, target: int) -> Tensor | None:
        """Return (d_sae, d_out) what features of layer ``source`` write to the MLP output of ``target``, or None."""
        if isinstance(self.transcoder, StackedLayer):
            return self.transcoder.writes(target)
        return self.transcoder.W_dec if source == target else None

    def at(self, token: int) -> slice:
        """Return the pairs of a token."""
        return slice(int(self.starts[token]), int(self.starts[token + 1]))

    def pair_of(self, token: int, feature: int) -> int | None:
        """Return the index of the pair (token, feature), None if the feature does not fire there."""
        matches = np.flatnonzero(self.ids[self.at(token)] == feature)
        return None if not len(matches) else int(self.starts[token]) + int(matches[0])

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """(n_active,) ``feature``, on the host."""
        return self.feature.cpu().numpy()

    @cached_property
    def encoder_bias(self) -> Tensor:
        """(d_sae,) what is added to pre-activations, on the CPU."""
        return self.transcoder.encoder_bias().detach().cpu()

    @cached_property
    def slope_and_offset(self) -> Tensor:
        """(2, n_active) on the CPU."""
        return torch.stack([self.slope, self.offset]).cpu()

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Pairs (T, most of a token) by token, those of a token with fewer filled up with pairs of others, and the
        place of each pair (n_active,) among them.
        """
        starts = self.starts.numpy()
        counts = np.diff(starts)
        most = max(1, int(counts.max(initial=0)))
        pairs = np.minimum(starts[:-1, None] + np.arange(most), max(0, self.n_active - 1))
        places = np.repeat(np.arange(len(counts)) * most - starts[:-1], counts) + np.arange(self.n_active)
        return torch.from_numpy(pairs).to(self.feature.device), torch.from_numpy(places).to(self.feature.device)


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer of the pass, T tokens long."""

    weights: LayerWeights
    stream: Tensor
    """(T, d_model) as it enters."""
    stream_mid: Tensor
    """(T, d_model) as the MLP's norm reads it."""
    pattern: Tensor
    """(n_heads, T, T): target, source."""
    values: Tensor
    """(T, n_kv_heads, d_head), b_V included."""
    scale_attention: Tensor
    """(T, 1) what the norm before attention divides by, as are the three below."""
    scale_mlp: Tensor
    scale_attention_out: Tensor
    scale_mlp_out: Tensor
    mlp_in: Tensor
    """(T, d_model) the MLP's recorded input."""
    mlp_out: Tensor
    """(T, d_model) and output."""
    features: ActiveFeatures | None
    """None where no transcoder stands in for the layer's MLP."""


@dataclass(frozen=True, eq=False)
class LinearisedRun:
    """A prompt, the model's pass over it, and the transcoders' active features. Positions count from 0."""

    tokens: Tensor
    """(T,) int64."""
    weights: ModelWeights
    layers: tuple[LayerRecord, ...]
    embedding: Tensor
    """(T, d_model) what enters layer 0, less learned positions."""
    position: Tensor | None
    """(T, d_model)."""
    stream: Tensor
    """(T, d_model) as it leaves the last layer."""
    scale_final: Tensor
    """(T, 1)."""
    normalised: Tensor
    """(T, d_model) the final norm's recorded output."""
    transcoded: Tensor
    """(T,) bool: where transcoders stand in; elsewhere an MLP's output is one node."""
    allow_opaque: bool = False
    """Whether quantities may be explained that whole MLPs of layers without a transcoder contribute to."""

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return int(self.tokens.numel())

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all tensors."""
        return self.stream.dtype

    @cached_property
    def transcoders(self) -> Mapping[int, ActiveFeatures]:
        """Active features by layer, for layers with a transcoder."""
        return {number: layer.features for number, layer in enumerate(self.layers) if layer.features is not None}

    def writers(self, layer: int) -> list[tuple[int, ActiveFeatures, Tensor]]:
        """Return what writes to a layer's MLP output: number, active features and decoder of each source layer."""
        writers = []
        for source, features in self.transcoders.items():
            decoder = features.writes(source, layer) if source <= layer else None
            if decoder is not None:
                writers.append((source, features, decoder))
        return writers

    def stands_in(self, layer: int, token: int) -> bool:
        """Return whether a transcoder stands in for the MLP of a layer at a token."""
        return self.layers[layer].features is not None and bool(self.transcoded[token])

    def reads_own_attention(self, part: Part) -> bool:
        """Return whether a probe at ``part`` of a layer reads what the layer's attention writes."""
        return part is Part.MID and not self.weights.is_parallel

    def activation(self, layer: int, part: Part, token: int) -> Tensor:
        """Return (d_model,) the recorded activation at a point of the pass."""
        if part is Part.OUT:
            return self.layers[layer].mlp_out[token]
        if layer == self.n_layers:
            return self.stream[token]
        return (self.layers[layer].stream_mid if part is Part.MID else self.layers[layer].stream)[token]

    def value(self, probe: Probe) -> float:
        """Return the value of a probe."""
        activation = self.activation(probe.layer, probe.part, probe.token)
        return float(activation.double() @ probe.vector.double()) + probe.constant
