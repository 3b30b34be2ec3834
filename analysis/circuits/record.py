"""Record of one pass over a prompt, with the patterns and scales that make it linear.

Attention patterns, the outputs of MLPs and the stream are read from the model's hooks; norm scales and values are
computed from them. Each part is then put together from its pieces and compared with the model's own, so that a model
family that computes it otherwise is refused here rather than explained wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.circuits.operators import apply_norm, mix, norm_scale, write_heads
from tailrace.analysis.circuits.run import ActiveFeatures, LayerRecord, LinearisedRun
from tailrace.analysis.splice.hook_points import name_problem, observed
from tailrace.analysis.weights.model_weights import AttentionWeights, LayerWeights, ModelWeights, Norm
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError
from tailrace.training.architectures.transcoder import Transcoder

_TOLERANCES = {torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Share of a token's norm by which a part may differ from its pieces: the rounding of a sublayer."""
_TOLERANCE = 1e-3
"""For float32, and for float64, in which some families still compute their norms in float32."""
_ROUNDING = 1e-6
"""Share of a token's norm by which two hooks may differ that hold the same: a gain of one is not always exact."""


def record_run(
    bridge: Any,
    weights: ModelWeights,
    transcoders: Mapping[Site, Transcoder],
    tokens: Tensor,
    *,
    transcoded: Tensor | None = None,
    dtype: torch.dtype | None = None,
    allow_opaque: bool = False,
) -> LinearisedRun:
    """Run ``bridge`` on ``tokens`` (T,) and return the pass with every transcoder's active features.

    ``transcoded`` (T,) bool says where transcoders stand in: everywhere but at position 0 by default, the BOS, which
    they never saw. ``dtype`` is that of the computation, by default the model's, but float32 if that is narrower. With
    ``allow_opaque``, the MLP of a layer without a transcoder is one node; else what depends on it is no root. Raises
    ModelError, listing every problem, for transcoders that do not stand in for whole MLPs of this model and for models
    whose parts do not add up as assumed.
    """
    tokens = tokens.reshape(-1)
    parameter = next(bridge.original_model.parameters())
    own, device = parameter.dtype, parameter.device
    wanted = dtype or (own if own in (torch.float32, torch.float64) else torch.float32)
    unknown = {site: _unknown_hooks(site, bridge.hook_dict) for site in transcoders}
    known = [site for site, lines in unknown.items() if not lines]
    with torch.inference_mode():
        seen = _observe(bridge, weights, tokens.to(device), known)
        seen = {name: value.to(wanted) for name, value in seen.items()}
    coders = {
        layer: (_as_needed(transcoders[site], device, wanted), not _holds_same(seen, site.hook_in, _mlp_in(layer)))
        for layer, site in _by_layer(known, seen, [line for lines in unknown.values() for line in lines]).items()
    }
    with torch.inference_mode():
        weights = replace(
            weights, layers=tuple(_cast(layer, wanted) for layer in weights.layers),
            final_norm=_cast(weights.final_norm, wanted),
        )  # fmt: skip
        if transcoded is None:
            transcoded = torch.arange(tokens.numel()) > 0
        problems: list[str] = []
        layers: list[LayerRecord] = []
        for number in range(weights.n_layers):
            tolerance = _TOLERANCES.get(own, _TOLERANCE)
            record = _layer(
                number, weights.layers[number], weights.is_parallel, seen, coders.get(number), transcoded, problems,
                tolerance,
            )  # fmt: skip
            layers.append(_less_what_earlier_layers_write(record, number, layers))
        if problems:
            raise ModelError(
                "this model's pass does not split into the parts that circuits are made of:\n"
                + "\n".join(f"  {line}" for line in problems)
            )
        stream = seen[f"blocks.{weights.n_layers - 1}.hook_out"]
        position = None if weights.W_pos is None else weights.W_pos[: tokens.numel()].to(wanted)
        return LinearisedRun(
            tokens=tokens.cpu(),
            weights=weights,
            layers=tuple(layers),
            embedding=seen["blocks.0.hook_in"] if position is None else seen["blocks.0.hook_in"] - position,
            position=position,
            stream=stream,
            scale_final=norm_scale(weights.final_norm, stream),
            normalised=seen["ln_final.hook_out"],
            transcoded=transcoded.cpu(),
            allow_opaque=allow_opaque,
        )


def part_problems(bridge: Any, weights: ModelWeights, tokens: Tensor) -> list[str]:
    """Return a sentence for each part of each block that ``weights`` do not give, on a run on ``tokens`` (T,).

    One layer is held in a wider dtype at a time. Raises ModelError where the model does not show its parts.
    """
    own = next(bridge.original_model.parameters()).dtype
    wanted = own if own in (torch.float32, torch.float64) else torch.float32
    problems: list[str] = []
    with torch.inference_mode():
        seen = {name: value.to(wanted) for name, value in _observe(bridge, weights, tokens, []).items()}
        nowhere = torch.zeros(tokens.numel(), dtype=torch.bool)
        for number, layer in enumerate(weights.layers):
            tolerance = _TOLERANCES.get(own, _TOLERANCE)
            _layer(number, _cast(layer, wanted), weights.is_parallel, seen, None, nowhere, problems, tolerance)
    return problems


def _as_needed(transcoder: Transcoder, device: torch.device, dtype: torch.dtype) -> Transcoder:
    """Return the transcoder on the device in the dtype; a copy if it differs, never made of inference tensors."""
    weight = transcoder.W_enc
    same = weight.device == device and weight.dtype == dtype
    return transcoder if same else copy.deepcopy(transcoder).to(device, dtype)


def mlp_layer(site: Site) -> int | None:
    """Return the layer that both hooks of a site name; None if they name none or two."""
    return site.layer


def _unknown_hooks(site: Site, points: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each hook of a site that the model lacks, or that is a head, and so no MLP's."""
    problems = []
    for name in dict.fromkeys((site.hook_in, site.hook_out)):
        line = name_problem(name, points)
        if line is None and HookName.parse(name).head is not None:
            line = f"{name} is a head, and circuits need transcoders of MLPs"
        problems += [] if line is None else [f"site {site.name}: {line}"]
    return problems


def _by_layer(sites: Iterable[Site], seen: Mapping[str, Tensor], problems: list[str]) -> dict[int, Site]:
    """Return sites by their layer. Raises ModelError with ``problems``, and for hooks that hold no MLP's own values.

    What hooks hold on this pass is compared, not their names or objects: ``ln2.hook_normalized`` is what the MLP reads
    where the norm's gain is folded into the weights, and ``hook_mlp_out`` what it writes where no norm follows.
    """
    by_layer: dict[int, Site] = {}
    for site in sites:
        layer = mlp_layer(site)
        if layer is None or not _is_mlp(site, layer, seen):
            problems.append(
                f"site {site.name}: {site.hook_in} to {site.hook_out} does not hold the input and output of one MLP in "
                "this model; circuits need transcoders of blocks.L.mlp.hook_in (or blocks.L.hook_resid_mid) and "
                "blocks.L.mlp.hook_out, or of hooks that hold the same"
            )
        elif layer in by_layer:
            problems.append(f"site {site.name}: layer {layer} has two transcoders; give one of them")
        else:
            by_layer[layer] = site
    if problems:
        raise ModelError(
            "cannot trace circuits with these transcoders:\n" + "\n".join(f"  {line}" for line in problems)
        )
    return by_layer


def _is_mlp(site: Site, layer: int, seen: Mapping[str, Tensor]) -> bool:
    reads = (_mlp_in(layer), f"blocks.{layer}.hook_resid_mid")
    return _holds_same(seen, site.hook_out, f"blocks.{layer}.mlp.hook_out") and any(
        _holds_same(seen, site.hook_in, name) for name in reads
    )


def _mlp_in(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_in"


def _holds_same(seen: Mapping[str, Tensor], name: str, other: str) -> bool:
    """Return whether two hooks hold the same numbers on this pass, up to rounding."""
    if name == other:
        return True
    one, two = seen.get(name), seen.get(other)
    return one is not None and two is not None and one.shape == two.shape and _difference(one, two) <= _ROUNDING


def _observe(bridge: Any, weights: ModelWeights, tokens: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the values of every hook needed, of the one context, in the model's dtype."""
    points: Mapping[str, Any] = bridge.hook_dict
    inner = ("hook_in", "hook_out", "attn.hook_out", "attn.hook_pattern", "mlp.hook_in", "mlp.hook_out")
    names = [f"blocks.{layer}.{name}" for layer in range(weights.n_layers) for name in inner]
    names += ["ln_final.hook_out", *(name for site in sites for name in (site.hook_in, site.hook_out))]
    streams = [name for site in sites if (name := f"blocks.{site.layer}.hook_resid_mid") in points]  # few lack it
    missing = [name for name in dict.fromkeys(names) if name not in points]
    if not missing:
        with observed(points, list(dict.fromkeys([*names, *streams]))) as observations:
            bridge(tokens[None], return_type=None, use_cache=False)
        seen: dict[str, Any] = dict(observations)  # some families hold a tuple that begins with the activation
        missing = [name for name in names if name not in seen]
    if missing:
        raise ModelError(
            f"this model shows nothing at {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; circuits need "
            "its stream, attention patterns and MLPs"
        )
    return {name: (value[0] if isinstance(value, tuple) else value)[0] for name, value in seen.items()}


def _layer(
    number: int,
    layer: LayerWeights,
    is_parallel: bool,
    seen: Mapping[str, Tensor],
    coder: tuple[Transcoder, bool] | None,
    transcoded: Tensor,
    problems: list[str],
    tolerance: float,
) -> LayerRecord:
    """Return one layer's record; add a sentence to ``problems`` for each part that its pieces do not give.

    ``coder`` is its transcoder, and whether that reads the stream before the MLP's norm.
    """
    here, attention = f"blocks.{number}.", layer.attention
    stream, attended = seen[f"{here}hook_in"], seen[f"{here}attn.hook_out"]
    mlp_in, mlp_out = seen[f"{here}mlp.hook_in"], seen[f"{here}mlp.hook_out"]
    scale_attention = norm_scale(layer.norm_attention, stream)
    values = torch.einsum("sd,gde->sge", apply_norm(layer.norm_attention, stream, scale_attention), attention.W_V)
    values = values if attention.b_V is None else values + attention.b_V
    scale_attention_out = norm_scale(layer.norm_attention_out, attended)
    scale_mlp_out = norm_scale(layer.norm_mlp_out, mlp_out)
    written = apply_norm(layer.norm_attention_out, attended, scale_attention_out)
    stream_mid = stream if is_parallel else stream + written
    pattern = seen[f"{here}attn.hook_pattern"]
    features = None
    if coder is not None:
        transcoder, reads_stream = coder
        inputs = stream_mid if reads_stream else mlp_in
        features = _active(transcoder, inputs, mlp_out, transcoded, reads_stream=reads_stream)
    record = LayerRecord(
        weights=layer,
        stream=stream,
        stream_mid=stream_mid,
        pattern=pattern,
        values=values,
        scale_attention=scale_attention,
        scale_mlp=norm_scale(layer.norm_mlp, stream_mid),
        scale_attention_out=scale_attention_out,
        scale_mlp_out=scale_mlp_out,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        features=features,
    )
    mixed = write_heads(attention, mix(attention, pattern, values))
    mixed = mixed if attention.b_O is None else mixed + attention.b_O
    after = stream + written + apply_norm(layer.norm_mlp_out, mlp_out, scale_mlp_out)
    checks = {
        "attention's output is not its values mixed by its patterns": (mixed, attended),
        "what the MLP reads is not its norm of the stream": (
            apply_norm(layer.norm_mlp, stream_mid, record.scale_mlp), mlp_in),
        "what leaves the block is not what entered plus attention's and the MLP's outputs": (
            after, seen[f"{here}hook_out"]),
    }  # fmt: skip
    for sentence, (made, recorded) in checks.items():
        if not (difference := _difference(made, recorded)) <= tolerance:  # NaN is no agreement
            problems.append(f"block {number}: {sentence} (they differ by {difference:.2g} of its norm)")
    if record.features is not None and not bool(torch.isfinite(record.features.error).all()):
        problems.append(f"block {number}: its transcoder writes NaN or infinity; run `pipeline verify` on it")
    return record


def _difference(made: Tensor, recorded: Tensor) -> float:
    """Return the largest norm of a token's difference relative to what was recorded there."""
    norms = torch.linalg.vector_norm(recorded.double(), dim=-1).clamp_min(1e-30)
    return float((torch.linalg.vector_norm((made - recorded).double(), dim=-1) / norms).max())


def _active(
    transcoder: Transcoder, inputs: Tensor, mlp_out: Tensor, transcoded: Tensor, *, reads_stream: bool
) -> ActiveFeatures:
    """Return the active features of every token where transcoders stand in."""
    stands_in = transcoded.to(inputs.device)
    pre = transcoder.pre_activations(inputs)
    activations = transcoder.activate(pre) * stands_in[:, None]
    token, feature = torch.nonzero(activations, as_tuple=True)
    activation, own_pre = activations[token, feature], pre[token, feature]
    # in all architectures but gated ones, the activation of an active feature is its pre-activation
    is_itself = torch.equal(activation, own_pre)
    slope = torch.ones_like(activation) if is_itself else _slopes(transcoder, pre)[token, feature]
    skip = None if transcoder.W_skip is None else (inputs @ transcoder.W_skip.T) * stands_in[:, None]
    error = (mlp_out - transcoder.decode(activations, inputs)) * stands_in[:, None]
    counts = torch.bincount(token, minlength=len(inputs)).cpu()
    return ActiveFeatures(
        transcoder=transcoder,
        inputs=inputs,
        reads_stream=reads_stream,
        token=token,
        feature=feature,
        activation=activation,
        slope=slope,
        offset=activation - slope * own_pre,
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        error=error,
        skip=skip,
    )


def _less_what_earlier_layers_write(record: LayerRecord, number: int, earlier: Sequence[LayerRecord]) -> LayerRecord:
    """Return the record with what features of earlier layers write to its MLP's output taken out of its error."""
    features = record.features
    if features is None:
        return record
    error = features.error
    for source, layer in enumerate(earlier):
        decoder = None if layer.features is None else layer.features.writes(source, number)
        if layer.features is not None and decoder is not None:
            written = layer.features.activation[:, None] * decoder[layer.features.feature]
            error = error.index_add(0, layer.features.token, -written)
    return replace(record, features=replace(features, error=error))


def _slopes(transcoder: Transcoder, pre: Tensor) -> Tensor:
    """Return the derivative of each activation by its own pre-activation, for any architecture."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = pre.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(transcoder.activate(leaf).sum(), leaf)
    return slopes


def _cast(weights: Any, dtype: torch.dtype) -> Any:
    """Return weights, a dataclass, with every tensor in ``dtype``; tensors of that dtype are shared."""
    changed: dict[str, Any] = {}
    for field in fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.to(dtype)
        elif isinstance(value, AttentionWeights | Norm):
            changed[field.name] = _cast(value, dtype)
    return replace(weights, **changed)
