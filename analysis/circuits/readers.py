"""Probes of what reads the stream: a feature, a head at a source token, a skip path, a logit.

A reader's probe is the direction it reads, pulled back through its norm to the stream; the norm's bias and the reader's
own are the probe's constant. The norm is applied here and nowhere else: a probe is never normalised again.
"""

from __future__ import annotations

from torch import Tensor

from tailrace.analysis.circuits.operators import pull_norm, read_heads
from tailrace.analysis.circuits.run import ActiveFeatures, LinearisedRun, Part, Probe
from tailrace.analysis.weights.model_weights import Norm


def feature_probe(run: LinearisedRun, layer: int, token: int, feature: int, gain: float = 1.0) -> Probe:
    """Return the probe of ``gain`` times a feature's activation, or its pre-activation where it does not fire.

    Of an active feature a = slope · (W_enc[i] · x + b_enc[i]) + offset with x the MLP's input: the slope is 1 and the
    offset 0 for all architectures but the gated, where they are exp(r) and b_mag (Rajamanoharan et al. 2024, eq. 7).
    """
    features = _features(run, layer)
    pair = features.pair_of(token, feature)
    slope, offset = (1.0, 0.0) if pair is None else features.slope_and_offset[:, pair].tolist()
    direction = features.transcoder.W_enc[feature] * slope
    bias = float(features.encoder_bias[feature]) * slope + offset
    return _of_inputs(run, layer, token, direction * gain, bias * gain)


def skip_probe(run: LinearisedRun, layer: int, token: int, direction: Tensor) -> Probe:
    """Return the probe of what a layer's skip path writes along ``direction`` (d_out,) of the MLP's output."""
    W_skip = _features(run, layer).transcoder.W_skip
    assert W_skip is not None, "only a skip transcoder has such a node"
    return _of_inputs(run, layer, token, direction @ W_skip, 0.0)


def decoder_probe(run: LinearisedRun, layer: int, token: int, feature: int) -> Probe:
    """Return the probe of the MLP's own output along a feature's decoder direction; no norm is involved."""
    return Probe(layer, Part.OUT, token, _features(run, layer).transcoder.W_dec[feature])


def head_probe(run: LinearisedRun, layer: int, head: int, target: int, source: int, direction: Tensor) -> Probe:
    """Return the probe of what a head brings from ``source`` to ``target`` along ``direction`` (d_model,) there.

    The vector is A · J^T W_V (W_O v), with J of the norm before attention, the constant what that norm's bias and b_V
    give: together they are the head's contribution.
    """
    record = run.layers[layer]
    attention = record.weights.attention
    v = pull_norm(record.weights.norm_attention_out, direction, record.scale_attention_out[target])
    kv = attention.kv_head(head)
    z = read_heads(attention, v)[head] * record.pattern[head, target, source]
    n = attention.W_V[kv] @ z
    constant = 0.0 if attention.b_V is None else float(attention.b_V[kv] @ z)
    norm = record.weights.norm_attention
    return Probe(
        layer,
        Part.PRE,
        source,
        pull_norm(norm, n, record.scale_attention[source]),
        constant + _of_bias(norm, n),
    )


def final_probe(run: LinearisedRun, token: int, direction: Tensor, constant: float = 0.0) -> Probe:
    """Return ``direction`` (d_model,) of the final norm's output, read off the stream before it."""
    norm = run.weights.final_norm
    vector = pull_norm(norm, direction, run.scale_final[token])
    return Probe(run.n_layers, Part.PRE, token, vector, constant + _of_bias(norm, direction))


def written_direction(run: LinearisedRun, layer: int, token: int, probe: Probe) -> Tensor:
    """Return the direction in the MLP's output of ``layer`` at ``token`` that ``probe`` reads there."""
    if probe.part is Part.OUT:
        return probe.vector
    record = run.layers[layer]
    return pull_norm(record.weights.norm_mlp_out, probe.vector, record.scale_mlp_out[token])


def _of_inputs(run: LinearisedRun, layer: int, token: int, direction: Tensor, constant: float) -> Probe:
    """Return ``direction`` (d_in,) of what the layer's transcoder reads, as read off the stream."""
    if _features(run, layer).reads_stream:
        return Probe(layer, Part.MID, token, direction, constant)
    record = run.layers[layer]
    norm = record.weights.norm_mlp
    vector = pull_norm(norm, direction, record.scale_mlp[token])
    return Probe(layer, Part.MID, token, vector, constant + _of_bias(norm, direction))


def _of_bias(norm: Norm, direction: Tensor) -> float:
    return 0.0 if norm.bias is None else float(norm.bias @ direction)


def _features(run: LinearisedRun, layer: int) -> ActiveFeatures:
    features = run.layers[layer].features
    assert features is not None, "roots and search check that the layer has a transcoder"
    return features
