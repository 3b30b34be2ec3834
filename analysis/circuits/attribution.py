"""Contributions to quantities through attention: features of all layers and tokens, errors, embeddings, constants.

Directions are pulled back through the frozen pass, a block of roots at once. What a feature writes reaches a root
along every route through the stream and attention that passes no other feature, and all of these are summed into one
number: the direct effect that is an edge of an attribution graph (Ameisen et al. 2025, "Circuit Tracing", section
"Constructing an attribution graph"). Skip paths are linear and are followed as well.

Memory: a few tensors of (roots, tokens, d_model), and the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.circuits.nodes import Kind, NodeColumns, columns_of, joined_columns
from tailrace.analysis.circuits.operators import pull_norm, read_heads, unmix
from tailrace.analysis.circuits.run import ActiveFeatures, LinearisedRun, Part, Probe
from tailrace.analysis.weights.model_weights import Norm
from tailrace.training.kernels.pairs import Pairs

FEW_ROOTS = 16
"""Most roots for which a compiled loop over pairs beats gathering the decoder rows of each token for a product: 0.25 ms
against 9 ms for one root, 128 tokens with 32 features of width 576 each, on one core."""
_BYTES_AT_ONCE = 1 << 30
"""Decoder rows that are gathered at a time on a GPU."""


@dataclass(frozen=True, eq=False)
class Sources:
    """The nodes of an attribution, in the order of its columns."""

    nodes: NodeColumns
    features: dict[int, slice]
    """Columns of each layer's active features, in the order of ``ActiveFeatures``."""
    errors: dict[int, slice]
    """Columns of each layer's errors, one per token; where no transcoder stands in, of the MLP itself."""
    embedding: slice
    position: slice
    attention_bias: slice
    """One column per layer, summed over tokens, as is ``decoder_bias``."""
    decoder_bias: slice
    bias: int
    """The root's own constant."""

    @property
    def n_sources(self) -> int:
        """Number of columns."""
        return self.nodes.n_nodes


def list_sources(run: LinearisedRun) -> Sources:
    """Return the columns of every attribution of ``run``."""
    parts: list[NodeColumns] = []
    end = 0

    def add(columns: NodeColumns) -> slice:
        nonlocal end
        parts.append(columns)
        end += columns.n_nodes
        return slice(end - columns.n_nodes, end)

    tokens = np.arange(run.n_tokens)
    transcoded = run.transcoded.numpy()
    features, errors = {}, {}
    for number, layer in enumerate(run.layers):
        if layer.features is not None:
            active = layer.features
            features[number] = add(columns_of(Kind.FEATURE, number, active.token.cpu().numpy(), active.ids))
        columns = columns_of(Kind.ERROR, number, tokens)
        opaque = columns_of(Kind.MLP, number, tokens)
        stands_in = transcoded if layer.features is not None else np.zeros_like(transcoded)
        errors[number] = add(replace(columns, kind=np.where(stands_in, columns.kind, opaque.kind)))
    layers = np.arange(run.n_layers)
    return Sources(
        features=features,
        errors=errors,
        embedding=add(columns_of(Kind.EMBEDDING, 0, tokens)),
        position=add(columns_of(Kind.POSITION, 0, tokens if run.position is not None else tokens[:0])),
        attention_bias=add(columns_of(Kind.ATTENTION_BIAS, layers)),
        decoder_bias=add(columns_of(Kind.DECODER_BIAS, layers)),
        bias=add(columns_of(Kind.BIAS)).start,
        nodes=joined_columns(parts),
    )


def attribute(run: LinearisedRun, probes: Sequence[Probe], sources: Sources | None = None) -> Tensor:
    """Return (n_probes, n_sources) what each source contributes to each probe; rows sum to the probes' values."""
    sources = sources or list_sources(run)
    out = run.stream.new_zeros(len(probes), sources.n_sources)
    # probes of the last layers come first, so that those in use are always a leading block
    order = sorted(range(len(probes)), key=lambda row: _height(probes[row]), reverse=True)
    with torch.inference_mode():
        pulled = _Pull(run, [probes[row] for row in order], sources).through_all()
        out[order] = pulled
    return out


def _height(probe: Probe) -> tuple[int, int]:
    return probe.layer, (Part.PRE, Part.MID, Part.OUT).index(probe.part)


class _Pull:
    """Directions pulled back through the pass: ``direction[r, t]`` is what probe r reads of the stream at t."""

    def __init__(self, run: LinearisedRun, probes: Sequence[Probe], sources: Sources) -> None:
        self._run, self._probes, self._sources = run, probes, sources
        self._n_tokens = 1 + max((probe.token for probe in probes), default=0)
        self._direction = run.stream.new_zeros(len(probes), self._n_tokens, run.stream.shape[1])
        self._out = run.stream.new_zeros(len(probes), sources.n_sources)
        self._n_live = 0

    def through_all(self) -> Tensor:
        run, out = self._run, self._out
        for row, probe in enumerate(self._probes):
            out[row, self._sources.bias] += probe.constant
        self._enter(run.n_layers, Part.PRE)
        for layer in reversed(range(run.n_layers)):
            skipped = self._read_mlp(layer)
            if not run.weights.is_parallel:
                self._add(skipped)
                self._enter(layer, Part.MID)
            self._read_attention(layer)
            if run.weights.is_parallel:
                self._add(skipped)
                self._enter(layer, Part.MID)
            self._enter(layer, Part.PRE)
        seen = slice(0, self._n_tokens)
        out[:, _narrow(self._sources.embedding, self._n_tokens)] = _dot_tokens(self._direction, run.embedding[seen])
        if run.position is not None:
            out[:, _narrow(self._sources.position, self._n_tokens)] = _dot_tokens(self._direction, run.position[seen])
        return out

    def _enter(self, layer: int, part: Part) -> None:
        """Add the directions of the probes at this point."""
        for row in range(self._n_live, len(self._probes)):
            probe = self._probes[row]
            if (probe.layer, probe.part) != (layer, part):
                break
            self._direction[row, probe.token] += probe.vector
            self._n_live += 1

    def _add(self, change: Tensor | None) -> None:
        if change is not None:
            self._direction[: len(change)] += change

    def _read_mlp(self, layer: int) -> Tensor | None:
        """Write what the layer's MLP contributes; return what its skip path reads, or None."""
        record, seen = self._run.layers[layer], slice(0, self._n_tokens)
        direction = self._direction[: self._n_live]
        v = pull_norm(record.weights.norm_mlp_out, direction, record.scale_mlp_out[seen])
        v = self._with_output_probes(layer, v)
        out = self._out[: len(v)]
        if not len(v):
            return None
        stands_in = self._run.transcoded[seen].to(v.device)
        if record.features is None:
            stands_in = torch.zeros_like(stands_in)
        rest = record.mlp_out[seen] * ~stands_in[:, None]
        features = record.features
        skipped = None
        if features is not None:
            coder = features.transcoder
            rest = rest + features.error[seen]
            for source, active, decoder in self._run.writers(layer):
                written = _written(active, decoder, v)
                column = self._sources.features[source].start
                out[:, column : column + written.shape[1]] += written
            bias = self._sources.decoder_bias.start + layer
            out[:, bias] += (v @ coder.b_dec_out) @ stands_in.to(v.dtype)
            if coder.W_skip is not None:
                n = (v * stands_in[:, None]) @ coder.W_skip
                skipped = n
                if not features.reads_stream:
                    out[:, bias] += _constant(record.weights.norm_mlp, n)
                    skipped = pull_norm(record.weights.norm_mlp, n, record.scale_mlp[seen])
        out[:, _narrow(self._sources.errors[layer], self._n_tokens)] = _dot_tokens(v, rest)
        bias_of_norm = _constant(record.weights.norm_mlp_out, direction)
        self._out[: len(direction), self._sources.decoder_bias.start + layer] += bias_of_norm
        return skipped

    def _with_output_probes(self, layer: int, v: Tensor) -> Tensor:
        """Return directions of the layer's output with the probes of that output behind them, which end there."""
        self._enter(layer, Part.OUT)
        rows = range(len(v), self._n_live)
        own = self._direction[len(v) : self._n_live].clone()
        # what they read is no part of the stream: only skip paths take them further
        for row in rows:
            self._direction[row] = 0
        return torch.cat([v, own]) if own.numel() else v

    def _read_attention(self, layer: int) -> None:
        """Move directions from where attention writes to where it reads."""
        record, n = self._run.layers[layer], self._n_tokens
        direction = self._direction[: self._n_live]
        if not len(direction):
            return
        attention, norm = record.weights.attention, record.weights.norm_attention
        v = pull_norm(record.weights.norm_attention_out, direction, record.scale_attention_out[:n])
        constant = _constant(record.weights.norm_attention_out, direction)
        if attention.b_O is not None:
            constant = constant + (v @ attention.b_O).sum(dim=1)
        z = unmix(attention, record.pattern[:, :n, :n], read_heads(attention, v))
        if attention.b_V is not None:
            constant = constant + torch.einsum("rsge,ge->r", z, attention.b_V)
        read = torch.einsum("rsge,gde->rsd", z, attention.W_V)
        self._out[: self._n_live, self._sources.attention_bias.start + layer] += constant + _constant(norm, read)
        direction += pull_norm(norm, read, record.scale_attention[:n])


def _written(features: ActiveFeatures, W_dec: Tensor, v: Tensor) -> Tensor:
    """Return (roots, n) what the features of the first T tokens write by ``W_dec`` along ``v`` (roots, T, d_out)."""
    n_tokens = v.shape[1]
    end = int(features.starts[n_tokens])
    if v.device.type != "cpu":
        dots = dots_at_once(features, W_dec, v)
    elif len(v) <= FEW_ROOTS:
        offsets = features.starts[: n_tokens + 1].numpy()
        pairs = Pairs(features.token[:end].numpy(), features.feature[:end].numpy(), offsets, len(W_dec))
        dots = torch.stack([pairs.dots(root.contiguous(), W_dec) for root in v])
    else:
        per_token = [v[:, token] @ W_dec[features.feature[features.at(token)]].T for token in range(n_tokens)]
        dots = torch.cat(per_token, dim=1)
    return dots * features.activation[:end]


def dots_at_once(features: ActiveFeatures, W_dec: Tensor, v: Tensor) -> Tensor:
    """Return (roots, n) the products of ``v`` (roots, T, d_out) with the decoder row of each pair, at its own token.

    Every token is given as many pairs as the one with most has, so that a few kernels do what would take several for
    each token; what is too much is left out of the result.
    """
    n_tokens, width = v.shape[1:]
    if not features.n_active:
        return v.new_zeros(len(v), 0)
    pairs, kept = features.padded
    at_once = max(1, _BYTES_AT_ONCE // (pairs.shape[1] * width * W_dec.element_size()))
    products = [
        torch.einsum("rtd,tpd->rtp", v[:, start : start + at_once], W_dec[features.feature[some]])
        for start, some in zip(range(0, n_tokens, at_once), torch.split(pairs[:n_tokens], at_once), strict=True)
    ]
    return torch.cat(products, dim=1).flatten(1).index_select(1, kept[: int(features.starts[n_tokens])])


def _dot_tokens(v: Tensor, activations: Tensor) -> Tensor:
    """Return (roots, T) the products of (roots, T, d) with (T, d), token by token."""
    return torch.einsum("rtd,td->rt", v, activations)


def _constant(norm: Norm, v: Tensor) -> Tensor:
    """Return (roots,) what a norm's bias gives along ``v`` (roots, T, d), over all tokens."""
    return v.new_zeros(len(v)) if norm.bias is None else (v @ norm.bias).sum(dim=1)


def _narrow(columns: slice, n: int) -> slice:
    """Return the first ``n`` of a run of columns, one per token."""
    return slice(columns.start, columns.start + n)
