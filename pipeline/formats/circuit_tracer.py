"""circuit-tracer's transcoder sets: ``config.yaml`` and ``layer_N.safetensors`` for every layer from 0 on.

A cross-layer transcoder has two files for every layer N in place of that one: ``W_enc_N.safetensors`` holds the
encoder, both biases and the thresholds, ``W_dec_N.safetensors`` what its features write to layers N, N + 1, …, as
(d_sae, L − N, d_model). The reader counts the encoders to know L, and asks the first of them alone whether there are
thresholds. Rows are kept as they are: their norm over all layers need not be 1.

Both matrices are feature-major, as ours. TopK is written with a threshold: releases up to 0.5.0 ignore, of a folder of
their own format, what the configuration says of top-k, and take the set for ReLU. Orientation and keys are those of
release 0.4 and later; the first release (June 2025) stored both matrices the other way round.

What is read here is one layer's file, with the set's ``config.yaml`` beside it if there is one. That a file is of the
first release, shapes alone give away: the encoder then has more columns than the input is wide. Cross-layer
transcoders are read by ``tailrace.pipeline.formats.cross_layer``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tailrace.pipeline.artifacts.transcoders import PublishedTranscoder, TranscoderLayer, layers_of
from tailrace.pipeline.formats.conversion import Converted, Written, is_raw, present
from tailrace.pipeline.formats.foreign import (
    Foreign,
    Key,
    Keys,
    Shapes,
    check_tensors,
    jsonable,
    keys_of,
    log_threshold,
    read_keys,
    read_tensors,
    refuse,
)
from tailrace.pipeline.formats.hooks import is_normalised_otherwise, layer_hooks
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.settings import load_yaml
from tailrace.training.architectures import Architecture, JumpReLU, ReLU, TopK
from tailrace.training.architectures.transcoder import write_tensors

CONFIG = "config.yaml"
CROSS_LAYER = "cross_layer_transcoder"
"""What the package calls them in a configuration."""

FIRST_RELEASE = "0.4"
"""The first release that has matrices and keys as they are written here."""

_LAYER = re.compile(r"layer_(\d{1,3})\.safetensors")
_THRESHOLD, _K = "activation_function.threshold", "k"
NEEDS = "transformer_lens"
"""Key of an export's config.yaml: the releases of TransformerLens that have its hooks. The package ignores it."""


def problems(transcoders: Sequence[PublishedTranscoder]) -> list[str]:
    """Return a sentence for everything that keeps these transcoders from making up a set, or one from being written."""
    across = [one for one in transcoders if one.is_cross_layer]
    if across and len(transcoders) > 1:
        paths = _listed([one.path for one in across])
        return [f"{paths}: a cross-layer transcoder is all layers by itself; export it alone"]
    layers = layers_of(transcoders)
    found = [line for one in layers for line in _layer_problems(one)]
    hooked = [hooks for one in layers if (hooks := layer_hooks(one.site)) is not None]
    numbers = sorted(hooks.layer for hooks in hooked)
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        found.append(f"layer {_listed(repeated)}: more than one transcoder was given; a set has one per layer")
    n_layers = max([*(int(one.model.get("n_layers", 0)) for one in layers), *(number + 1 for number in numbers), 0])
    if missing := sorted(set(range(n_layers)) - set(numbers)):
        found.append(
            f"layer {_listed(missing)}: "
            + (f"{across[0].path} does not read it" if across else "no transcoder was given")
            + f"; circuit-tracer replaces the MLP of every layer, from 0 to {n_layers - 1}"
            + (", and its files cannot say which layers they are. " + _TRAIN_ON_ALL if across else "")
        )
    kinds: dict[str, set[Any]] = {
        "d_sae": {one.d_sae for one in layers},
        "input hook": {hooks.input for hooks in hooked},
        "output hook": {hooks.output for hooks in hooked},
        "a skip path": {one.skips for one in layers},
        "model": {str(one.model.get("name")) for one in layers},
    }
    found += [
        f"{name}: is {_listed(sorted(values, key=str))} in one set; it must be the same in all layers"
        for name, values in kinds.items()
        if len(values) > 1
    ]
    return list(dict.fromkeys(found))


_TRAIN_ON_ALL = "Train one over all of them: pipeline cache with --layers all, then pipeline train --cross-layer"


def _layer_problems(layer: TranscoderLayer) -> list[str]:
    path, site, found = layer.path, layer.site, []
    if layer_hooks(site) is None:
        found.append(
            f"{path}: reads {site.hook_in} and writes {site.hook_out}; a set needs the input and output of one layer's "
            "MLP, such as blocks.3.mlp.hook_in and blocks.3.mlp.hook_out"
        )
    elif layer.is_autoencoder:
        found.append(f"{path}: is an autoencoder of {site.hook_in}; circuit-tracer replaces MLPs")
    if site.d_in != site.d_out:
        found.append(f"{path}: maps width {site.d_in} to {site.d_out}; circuit-tracer holds one width only")
    if not is_raw(layer):
        found.append(
            f"{path}: was trained on a language model whose norms are folded into its weights (processing "
            "compatibility); circuit-tracer loads the model as published, where the same hooks hold other vectors, so "
            "the set would be wrong there. Cache with --processing raw and train on that"
        )
    return found


@torch.no_grad()
def write(
    directory: Path, layers: Iterable[Converted], model: Mapping[str, Any], model_name: str, scan: str | None
) -> Written:
    """Write layers that have been checked, one at a time; return the files, and what the thresholds cost."""
    files, costs, hooks, kind = [CONFIG], {}, ("", ""), "transcoder_set"
    for one in layers:
        layer, form, hooks = one.layer, one.form, (one.hook_in, one.hook_out)
        if one.cost is not None:
            costs[layer.site.name] = one.cost
        number = layer.site.layer
        encoder = {"W_enc": form.W_enc, "b_enc": form.b_enc, "b_dec": form.b_dec}
        if layer.index is None:
            others = {"W_dec": form.W_dec, _THRESHOLD: form.threshold, "W_skip": form.W_skip}
            contents = {f"layer_{number}": present({**encoder, **others})}
        else:
            kind = CROSS_LAYER
            if layer.kind != "relu":  # of all layers or of none, whether they are zero in this one or not
                encoder["threshold"] = torch.zeros_like(form.b_enc) if form.threshold is None else form.threshold
            contents = {
                f"W_enc_{number}": {f"{name}_{number}": values for name, values in encoder.items()},
                f"W_dec_{number}": {f"W_dec_{number}": layer.load_writes()},
            }
        for name, tensors in contents.items():
            files.append(f"{name}.safetensors")
            write_tensors(directory / files[-1], tensors)
    is_of_release_3 = any(is_normalised_otherwise(hook, model) for hook in hooks)
    config: dict[str, Any] = {
        "model_name": model_name,
        "model_kind": kind,
        "feature_input_hook": hooks[0].split(".", 2)[2],
        "feature_output_hook": hooks[1].split(".", 2)[2],
        **({} if scan is None else {"scan": scan}),
        **({NEEDS: ">=3"} if is_of_release_3 else {}),
    }
    # Last: it is what the package reads first.
    write_atomically(directory / CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
    return Written(files, costs, [_NOTE_ON_RELEASES])


_NOTE_ON_RELEASES = (
    f"read by circuit-tracer from {FIRST_RELEASE} on; to load it from disk, set CIRCUIT_TRACER_CACHE_DIR to the folder "
    "that holds the export and give the export's name for the transcoders (docs/export.md)"
)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


KEYS: Keys = {
    "model_kind": Key("whether features write to one layer or to several"),
    **keys_of("where it belongs", "model_name feature_input_hook feature_output_hook", str),
    "activation": Key("what becomes of pre-activations, where the tensors do not say it", None, (None, "topk", "relu")),
    "k": Key("how many features fire on a row, of activation: topk", kind=float),
    **keys_of("the viewer's name of the set", "scan scan_name"),
    **keys_of("where the files came from", "repo_id revision subfolder transcoders"),
    **keys_of("what its hooks need, as an export from here says", NEEDS),
}
"""Of config.yaml, up to 0.5.1."""
_SHAPES: Shapes = {
    "W_enc": ("d_sae", "d_model"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_model"),
    "b_dec": ("d_model",),
}
_OPTIONAL: Shapes = {_THRESHOLD: ("d_sae",), "W_skip": ("d_model", "d_model"), _K: ()}


def read(path: Path) -> Foreign:
    """Read one file.

    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for a cross-layer transcoder, unknown tensors and
    keys, the first release's orientation, and what contradicts itself.
    """
    tensors = read_tensors(path)
    _refuse_first_release(path, tensors)
    if _THRESHOLD in tensors and tensors[_THRESHOLD].numel() == 1 and "b_enc" in tensors:
        tensors[_THRESHOLD] = tensors[_THRESHOLD].reshape(1).expand(tensors["b_enc"].shape)
    tensors = check_tensors(path, tensors, _SHAPES, _OPTIONAL)
    config = _read_config(path.parent / CONFIG)
    said = read_keys(path.parent / CONFIG, config, KEYS)
    if (kind := said["model_kind"]) not in (None, "transcoder_set"):
        raise ArtifactMismatch(
            f"{path.parent / CONFIG}: is a {kind}, wanted a transcoder_set; of a {CROSS_LAYER}, give the "
            f"whole folder: {path.parent}"
        )
    skips, jumps = "W_skip" in tensors, _THRESHOLD in tensors
    k = _k(path, tensors, said)
    weights = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec")} | {"b_dec_out": tensors["b_dec"]}
    if jumps:
        weights["log_threshold"] = log_threshold(path, tensors[_THRESHOLD])
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    match = _LAYER.fullmatch(path.name)
    hooks = {side: _hook(match, said[f"feature_{side}_hook"]) for side in ("input", "output")}
    architecture: Architecture = JumpReLU(skip=skips) if jumps else ReLU(input_bias=False, skip=skips)
    return Foreign(
        architecture=architecture if k is None else TopK.read({"k": k, "skip": skips}, where=str(path)),
        weights=weights,
        hook_in=hooks["input"],
        hook_out=hooks["output"],
        model_name=said["model_name"],
        facts=jsonable(config),
        notes=() if k is None else (_NOTE_ON_TOPK,),
    )


def _refuse_first_release(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if not {"W_enc", "b_enc", "b_dec"} <= tensors.keys():
        return
    d_sae, d_model = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    if tuple(tensors["W_enc"].shape) == (d_model, d_sae) != (d_sae, d_model):
        raise ArtifactMismatch(
            f"{path}: W_enc has shape {(d_model, d_sae)}, wanted {(d_sae, d_model)}: it is of circuit-tracer's first "
            "release, whose matrices are the other way round; load and save it with a release from 0.4 on"
        )


_NOTE_ON_TOPK = (
    "circuit-tracer keeps the k largest values of a row even where they are below zero; here values below zero do not "
    "fire, so a row on which fewer than k features are above zero differs"
)


def _k(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int | None:
    """Return k of TopK, None for others. Raises ArtifactMismatch where file and configuration contradict each other."""
    beside = path.parent / CONFIG
    given = {name: value for name, value in ((path.name, tensors.get(_K)), (CONFIG, said["k"])) if value is not None}
    numbers = {name: float(value) for name, value in given.items()}
    problems = []
    is_topk = said["activation"] == "topk" or _K in tensors
    if is_topk and _THRESHOLD in tensors:
        problems.append(f"says topk, and {path.name} holds {_THRESHOLD}, which is another rule")
    if said["activation"] == "relu" and (_THRESHOLD in tensors or _K in tensors):
        problems.append(f"activation is 'relu', and {path.name} holds {_THRESHOLD if _THRESHOLD in tensors else _K}")
    if is_topk and not numbers:
        problems.append(f"says activation: topk, but neither it nor {path.name} says k")
    if not is_topk and numbers:
        problems.append(f"k is {said['k']}, without activation: topk")
    if len(set(numbers.values())) > 1 or any(number < 1 or number % 1 for number in numbers.values()):
        listed = ", ".join(f"{number:g} in {name}" for name, number in numbers.items())
        problems.append(f"k is {listed}; wanted the same whole number from 1 on")
    refuse(beside, problems)
    return int(next(iter(numbers.values()))) if is_topk else None


def _read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a set; empty if there is none."""
    return load_yaml(path) if path.is_file() else {}


def _hook(layer: re.Match[str] | None, name: str | None) -> str | None:
    return None if layer is None or name is None else f"blocks.{layer[1]}.{name}"
