"""Transcoders in the form that other tools can hold, with the norm before the MLP folded in where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.pipeline.analyze.stage import check_same_site
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.formats import calibration as calibrations
from tailrace.pipeline.formats.hooks import MLP_IN, MLP_OUT, NORMALISED_IN, STREAM_OUT, layer_hooks
from tailrace.pipeline.formats.jump_form import JumpForm, jump_form
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.generations import CachePath


@dataclass(frozen=True)
class Converted:
    """A layer in the common form, with the hooks it now belongs to and what the conversion did."""

    layer: TranscoderLayer
    form: JumpForm
    """Of a cross-layer transcoder, the decoder is the sum of what the layer's features write."""
    hook_in: str
    hook_out: str
    cost: calibrations.Calibration | None
    """Of thresholds that stand in for k; None where nothing had to."""


class Written(NamedTuple):
    """What a writer did."""

    files: list[str]
    """Names inside the directory."""
    costs: Mapping[str, calibrations.Calibration] = {}
    """Of thresholds that stand in for k, by site."""
    notes: Sequence[str] = ()
    """What else a user should read."""


def convert(
    layers: Sequence[TranscoderLayer], *, cache: CachePath | None, rows: int, weights: ModelWeights | None
) -> Iterator[Converted]:
    """Bring layers into the common form, each when it is asked for.

    ``cache`` is where TopK's thresholds are calibrated and measured, on ``rows`` rows. With the language model's
    ``weights``, the gain and bias of the norm before the MLP are folded in, so that the input is
    ``ln2.hook_normalized``. Before the first one, raises SettingsError where a cache is needed and missing and for what
    cannot be folded, ArtifactMismatch for a cache of another site or model; all problems at once.
    """
    problems = [] if weights is None else [line for one in layers for line in _folding_problems(one, weights)]
    wanting = [one for one in layers if needs_calibration(one)]
    if wanting and cache is None:
        problems.append(
            f"{', '.join(map(str, wanting))}: TopK has no thresholds, and this format holds nothing else; give "
            "--cache, on whose rows they are chosen and their cost measured"
        )
    if problems:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    opened = None if cache is None else open_cache(cache)
    if opened is not None:
        _check_sites(opened, wanting)
    for one in layers:
        yield _convert(one, opened, rows, weights)


def needs_calibration(layer: TranscoderLayer) -> bool:
    """Tell whether no thresholds give a layer's activations exactly."""
    return layer.kind == "topk"


def is_raw(layer: TranscoderLayer) -> bool:
    """Tell whether the language model's weights are as published; what is not recorded counts as raw."""
    return bool(layer.model.get("processing", "raw") == "raw")


def _check_sites(cache: ActivationCache, layers: Sequence[TranscoderLayer]) -> None:
    problems = []
    for one in layers:
        try:
            check_same_site(cache, one)
        except ArtifactMismatch as error:
            problems.append(str(error))
    if problems:
        raise ArtifactMismatch("\n".join(problems))


def _convert(
    layer: TranscoderLayer, cache: ActivationCache | None, rows: int, weights: ModelWeights | None
) -> Converted:
    cost, transcoder, site = None, layer.load(), layer.site
    if needs_calibration(layer):
        assert cache is not None
        form, cost = calibrations.calibrate(transcoder, cache, cache.sites[site.name], rows)
    else:
        form = jump_form(transcoder)
    if weights is None:
        return Converted(layer, form, site.hook_in, site.hook_out, cost)
    assert site.layer is not None, "it was checked that its norm can be folded in"
    block, norm = f"blocks.{site.layer}", weights.layers[site.layer].norm_mlp
    return Converted(layer, form.before_gain(norm), f"{block}.{NORMALISED_IN}", f"{block}.{STREAM_OUT}", cost)


def _folding_problems(layer: TranscoderLayer, weights: ModelWeights) -> list[str]:
    """Return a sentence for each reason why the norm before the MLP cannot be folded into a layer."""
    site, hooks = layer.site, layer_hooks(layer.site)
    if hooks is None or (hooks.input, hooks.output) != (MLP_IN, MLP_OUT):
        return [
            f"{layer.path}: reads {site.hook_in} and writes {site.hook_out}; only a transcoder of blocks.L.mlp.hook_in "
            "and blocks.L.mlp.hook_out has a norm to fold in; leave out --fold-norm"
        ]
    if not is_raw(layer):
        return [f"{layer.path}: its language model's norms are folded into the weights already; leave out --fold-norm"]
    of_model = weights.layers[hooks.layer]
    if of_model.norm_mlp.kind == "none":
        return [f"{layer.path}: this model has no norm of its own before the MLP; leave out --fold-norm"]
    if of_model.norm_mlp_out.kind != "none":
        return [
            f"{layer.path}: this model has a norm after the MLP, so what is added to the stream is no linear map of "
            "what the transcoder writes; leave out --fold-norm"
        ]
    return []


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in the order given. Raises StorageFull if the disk refuses."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def present(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors there are."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
