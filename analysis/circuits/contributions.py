"""The terms of a quantity, one step back: everything that writes to the stream it reads, at its own token.

Attention heads are terms of their own here, one per source token; a path continues through them. ``attribution`` goes
through attention instead, to features of all tokens at once. Both are exact: the terms sum to the quantity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.circuits.nodes import Kind, NodeColumns, columns_of, joined_columns
from tailrace.analysis.circuits.operators import head_contributions, pull_norm
from tailrace.analysis.circuits.readers import written_direction
from tailrace.analysis.circuits.run import LinearisedRun, Part, Probe


@dataclass(frozen=True, eq=False)
class Terms:
    """Nodes and their contributions."""

    nodes: NodeColumns
    values: NDArray[np.float64]
    """(n,)."""

    @property
    def total(self) -> float:
        """Σ terms."""
        return float(self.values.sum())

    @property
    def magnitude(self) -> float:
        """Σ |terms|, the scale of rounding errors."""
        return float(np.abs(self.values).sum())

    def sum_of(self, *kinds: Kind) -> float:
        """Return the sum of the terms of some kinds."""
        return float(self.values[self.nodes.are(*kinds)].sum())

    def incompleteness(self, value: float) -> float:
        """Return |Σ terms − value| / Σ |terms|: zero up to rounding if nothing is missing."""
        return abs(self.total - value) / max(self.magnitude, float(np.finfo(np.float64).tiny))


def contributions(run: LinearisedRun, probe: Probe) -> Terms:
    """Return every term of a probe's value; with the probe's own constant they sum to it.

    Of the MLP's output (``Part.OUT``): that MLP's features, bias, skip path and error. Of the stream: the same of
    every MLP below, each head and source of every attention below (its own layer's too, if it is read), their biases,
    the token's embedding and its position's.
    """
    with torch.inference_mode():
        parts = list(_parts(run, probe))
        values = torch.cat([values.double().reshape(-1) for _, values in parts]).cpu()
    return Terms(joined_columns([columns for columns, _ in parts]), values.numpy())


def _parts(run: LinearisedRun, probe: Probe) -> Iterator[tuple[NodeColumns, Tensor]]:
    v, token = probe.vector, probe.token
    yield columns_of(Kind.BIAS, probe.layer, token), v.new_full((1,), probe.constant, dtype=torch.float64)
    outputs = [probe.layer] if probe.part is Part.OUT else list(range(probe.layer))
    read = {layer: written_direction(run, layer, token, probe) for layer in outputs}
    for layer in range(max(outputs, default=-1) + 1):
        yield from _of_features(run, read, token, layer)
        if layer in read:
            yield from _of_mlp(run, probe, layer, read[layer])
    if probe.part is Part.OUT:
        return
    for layer in range(probe.layer + run.reads_own_attention(probe.part)):
        yield from _of_attention(run, probe, layer)
    yield columns_of(Kind.EMBEDDING, 0, token), run.embedding[token] @ v
    if run.position is not None:
        yield columns_of(Kind.POSITION, 0, token), run.position[token] @ v


def _of_features(
    run: LinearisedRun, read: Mapping[int, Tensor], token: int, layer: int
) -> Iterator[tuple[NodeColumns, Tensor]]:
    """Yield what a layer's features at ``token`` write along the directions read of MLP outputs, by layer."""
    if not run.stands_in(layer, token):
        return
    features = run.transcoders[layer]
    here = features.at(token)
    chosen = features.feature[here]
    decoders = [(features.writes(layer, target), v) for target, v in read.items()]
    along = [decoder[chosen] @ v for decoder, v in decoders if decoder is not None]
    if along:
        written = features.activation[here] * sum(along[1:], along[0])
        yield columns_of(Kind.FEATURE, layer, token, features.ids[here]), written


def _of_mlp(run: LinearisedRun, probe: Probe, layer: int, v: Tensor) -> Iterator[tuple[NodeColumns, Tensor]]:
    """Yield the rest of an MLP's output along ``v`` (d_out,): biases, error, skip path, or all of it as one node."""
    token, record = probe.token, run.layers[layer]
    bias = None if probe.part is Part.OUT else record.weights.norm_mlp_out.bias
    constant = torch.zeros_like(v[0]) if bias is None else bias @ probe.vector
    if not run.stands_in(layer, token):
        yield columns_of(Kind.MLP, layer, token), record.mlp_out[token] @ v + constant
        return
    features = run.transcoders[layer]
    yield columns_of(Kind.DECODER_BIAS, layer, token), features.transcoder.b_dec_out @ v + constant
    yield columns_of(Kind.ERROR, layer, token), features.error[token] @ v
    if features.skip is not None:
        yield columns_of(Kind.SKIP, layer, token), features.skip[token] @ v


def _of_attention(run: LinearisedRun, probe: Probe, layer: int) -> Iterator[tuple[NodeColumns, Tensor]]:
    record, token = run.layers[layer], probe.token
    attention, norm = record.weights.attention, record.weights.norm_attention_out
    v = pull_norm(norm, probe.vector, record.scale_attention_out[token])
    seen = slice(0, token + 1)
    values = head_contributions(attention, record.pattern[:, token, seen], record.values[seen], v)
    heads, sources = np.indices(values.shape)
    yield columns_of(Kind.HEAD, layer, sources.ravel(), heads.ravel()), values
    if attention.b_O is not None or norm.bias is not None:
        constant = torch.zeros_like(v[0])
        constant = constant if attention.b_O is None else constant + attention.b_O @ v
        constant = constant if norm.bias is None else constant + norm.bias @ probe.vector
        yield columns_of(Kind.ATTENTION_BIAS, layer, token), constant
