"""Roots of circuits: a feature, its decoder direction, a logit, a difference of logits, any direction.

The user's numbers are checked here; tokens may count from the end and are kept as positions from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.readers import decoder_probe, feature_probe, final_probe
from tailrace.analysis.circuits.run import LinearisedRun, Part, Probe
from tailrace.storage.errors import SettingsError


@dataclass(frozen=True, eq=False)
class Root:
    """A quantity of a pass, and its recorded value."""

    node: Node
    probe: Probe
    value: float
    """Recorded, not summed from parts; the completeness identity says that the parts sum to it."""
    is_active: bool = True
    """False for a feature that does not fire: its pre-activation is explained."""


def feature_root(run: LinearisedRun, layer: int, feature: int, token: int = -1) -> Root:
    """Return a feature's activation, or where it does not fire its pre-activation.

    Raises SettingsError for a layer without transcoder, there or below (unless the run allows that), a feature or token
    out of range, and a position at which no transcoder stands in.
    """
    position = checked_token(run, token)
    check_feature(run, layer, feature)
    _check_transcoded(run, position)
    _check_below(run, layer)
    features = run.transcoders[layer]
    pair = features.pair_of(position, feature)
    if pair is None:
        inputs = features.inputs[position]
        value = float(features.transcoder.pre_activations_of(torch.tensor([feature], device=inputs.device), inputs))
    else:
        value = float(features.activation[pair])
    probe = feature_probe(run, layer, position, feature)
    return Root(Node(Kind.FEATURE, layer, position, feature), probe, value, is_active=pair is not None)


def decoder_root(run: LinearisedRun, layer: int, feature: int, token: int = -1) -> Root:
    """Return the product of a feature's decoder direction with its own MLP's output; raises as ``feature_root``."""
    position = checked_token(run, token)
    check_feature(run, layer, feature)
    _check_transcoded(run, position)
    probe = decoder_probe(run, layer, position, feature)
    return Root(Node(Kind.DECODER, layer, position, feature), probe, run.value(probe))


def logit_root(run: LinearisedRun, token_id: int, token: int = -1, *, minus: int | None = None) -> Root:
    """Return the logit of ``token_id``, or its difference to that of ``minus``, predicted at a position.

    Through the final norm with its scale held fixed, before the cap on logits of some models. Raises
    SettingsError for a token id or position out of range, the difference of a logit to itself, and layers without a
    transcoder unless the run allows them.
    """
    position = checked_token(run, token)
    _check_below(run, run.n_layers)
    ids = [token_id] if minus is None else [token_id, minus]
    beyond = [number for number in ids if not 0 <= number < run.weights.d_vocab]
    if beyond:
        raise SettingsError(f"token ids {beyond}: this model has 0 to {run.weights.d_vocab - 1}")
    if token_id == minus:
        raise SettingsError(
            f"logit difference: both are token {token_id}, so there is nothing to explain; give two tokens"
        )
    direction = _unembedding(run, token_id)
    constant = 0.0 if run.weights.b_U is None else float(run.weights.b_U[token_id])
    node = Node(Kind.LOGIT, run.n_layers, position, token_id)
    if minus is not None:
        direction = direction - _unembedding(run, minus)
        constant -= 0.0 if run.weights.b_U is None else float(run.weights.b_U[minus])
        node = Node(Kind.LOGIT_DIFFERENCE, run.n_layers, position, token_id, minus)
    value = float(run.normalised[position].double() @ direction.double()) + constant
    return Root(node, final_probe(run, position, direction, constant), value)


def centred_logit_roots(run: LinearisedRun, token_ids: Sequence[int], token: int = -1) -> list[Root]:
    """Return logits less the mean logit over the vocabulary, the roots of attribution graphs (Ameisen et al. 2025)."""
    position = checked_token(run, token)
    _check_below(run, run.n_layers)
    mean = run.weights.W_U.to(run.dtype).mean(dim=1)
    b_U = run.weights.b_U
    roots = []
    for token_id in token_ids:
        direction = _unembedding(run, token_id) - mean
        constant = 0.0 if b_U is None else float(b_U[token_id] - b_U.mean())
        value = float(run.normalised[position].double() @ direction.double()) + constant
        probe = final_probe(run, position, direction, constant)
        roots.append(Root(Node(Kind.LOGIT, run.n_layers, position, token_id), probe, value))
    return roots


def direction_root(
    run: LinearisedRun, vector: Tensor, layer: int, token: int = -1, *, part: Part = Part.PRE, number: int = 0
) -> Root:
    """Return the product of ``vector`` (d_model,) with the activation at a point of the pass; no norm is applied.

    ``layer`` = number of layers with ``part`` PRE is the stream after the last layer. Raises SettingsError for another
    shape, a layer or a token out of range.
    """
    position = checked_token(run, token)
    last = run.n_layers if part is Part.PRE else run.n_layers - 1
    if vector.shape != run.stream.shape[1:] or not 0 <= layer <= last:
        raise SettingsError(
            f"a direction of shape {tuple(vector.shape)} at {part.value} of layer {layer}: wanted "
            f"({run.stream.shape[1]},) and a layer from 0 to {last}"
        )
    _check_below(run, layer + (part is Part.OUT))
    probe = Probe(layer, part, position, vector.to(run.stream.device, run.dtype))
    return Root(Node(Kind.DIRECTION, layer, position, number), probe, run.value(probe))


def checked_token(run: LinearisedRun, token: int) -> int:
    """Return a position from 0; negative ones count from the end. Raises SettingsError if there is no such token."""
    if not -run.n_tokens <= token < run.n_tokens:
        raise SettingsError(
            f"token {token}: the prompt has {run.n_tokens} tokens, 0 to {run.n_tokens - 1} "
            f"(or -{run.n_tokens} to -1, counted from its end)"
        )
    return token % run.n_tokens


def check_feature(run: LinearisedRun, layer: int, feature: int) -> None:
    """Raise SettingsError if no transcoder stands in for ``layer`` or it has no such feature."""
    if layer not in run.transcoders:
        have = ", ".join(map(str, run.transcoders)) or "none"
        raise SettingsError(f"layer {layer}: no transcoder of it was given; layers with one: {have}")
    d_sae = run.transcoders[layer].transcoder.d_sae
    if not 0 <= feature < d_sae:
        raise SettingsError(f"feature {layer}:{feature}: this transcoder has features 0 to {d_sae - 1}")


def _check_transcoded(run: LinearisedRun, position: int) -> None:
    if not bool(run.transcoded[position]):
        raise SettingsError(
            f"token {position}: transcoders do not stand in there (they were never trained on "
            f"{'the BOS, at position 0' if position == 0 else 'tokens like it'}); choose another, "
            f"such as one of {_some(torch.nonzero(run.transcoded).flatten().tolist())}"
        )


def _some(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:4])) or "none, in so short a prompt"
    return f"{shown}, …" if len(positions) > 4 else shown


def _check_below(run: LinearisedRun, layer: int) -> None:
    without = [below for below in range(layer) if below not in run.transcoders]
    if without and not run.allow_opaque:
        raise SettingsError(
            f"layers {', '.join(map(str, without))}: no transcoder of them was given, so what their MLPs do cannot be "
            "explained by features; give them too, or allow whole MLPs as nodes (allow_opaque)"
        )


def _unembedding(run: LinearisedRun, token_id: int) -> Tensor:
    return run.weights.W_U[:, token_id].to(run.dtype)
