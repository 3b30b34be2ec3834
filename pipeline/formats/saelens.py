"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, encoder stored input-major.

Three things its reader does that a writer must know: without ``metadata.sae_lens_version`` it takes the folder for one
of an old release and drops the metadata; transcoders must say ``apply_b_dec_to_input: false``; and it has no TopK
transcoder, so TopK is written as JumpReLU. A TopK autoencoder it has, with k.

Hooks are named as ``HookedSAETransformer`` has them: one it does not have it skips with a line in the log, and the loss
is then the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.formats.conversion import Converted, Written
from tailrace.pipeline.formats.foreign import (
    Foreign,
    check_names,
    jsonable,
    log_threshold,
    read_config,
    read_tensors,
    without_input_bias,
)
from tailrace.pipeline.formats.hooks import MLP_IN, hooked_transformer_name, why_unnamed
from tailrace.pipeline.formats.jump_form import JumpForm, jump_form
from tailrace.pipeline.formats.subjects import Subject, present, write_json
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.architectures import Architecture, JumpReLU, ReLU, TopK
from tailrace.training.architectures.transcoder import write_tensors

FORMAT_OF = "6.54.12"
"""The release of SAELens whose reader this was written for and tested with."""
ATTACHES_FROM = "6.34"
"""The first release that puts a transcoder's output where it belongs; earlier ones put it where its input is read."""
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_COMPATIBILITY = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What ``HookedTransformer`` did to a model's weights by default, and what our ``compatibility`` stands for."""

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
AUTOENCODERS = ("standard", "jumprelu", "topk")


def problems(subjects: Sequence[Subject]) -> list[str]:
    """Return a sentence for everything that keeps these transcoders from being written."""
    if len(subjects) > 1:
        return [
            f"a SAELens folder holds one transcoder, {len(subjects)} were given; export each to a folder of its own"
        ]
    return [
        f"{one.path}: is an autoencoder with a path past its features, which SAELens has for transcoders only"
        for one in subjects
        if one.is_autoencoder and one.skips
    ]


def is_topk_autoencoder(subject: Subject) -> bool:
    """Tell whether SAELens has this transcoder's own rule, so that no threshold must stand in for k."""
    return subject.is_autoencoder and subject.needs_calibration


def write_topk_autoencoder(directory: Path, subject: Subject, model_name: str) -> Written:
    """Write a TopK autoencoder with its k."""
    form = jump_form(subject.load(), torch.zeros(subject.d_sae))
    config = {"architecture": "topk", "k": subject.manifest["architecture"]["k"], "rescale_acts_by_decoder_norm": False}
    hooks = (subject.site["hook_in"], subject.site["hook_out"])
    files = _write(directory, form, config, _metadata(subject, hooks, model_name))
    return Written(files, {}, attaching(subject, *hooks))


def write(directory: Path, converted: Converted, model_name: str) -> Written:
    """Write a transcoder or autoencoder; what the thresholds cost, and where it attaches, is returned too."""
    form, subject = converted.form, converted.subject
    if subject.is_autoencoder:
        config: dict[str, Any] = {"architecture": "standard" if form.threshold is None else "jumprelu"}
    else:
        kind = ("jumprelu_" if form.threshold is not None else "") + ("skip_" if form.W_skip is not None else "")
        config = {"architecture": f"{kind}transcoder", "d_out": form.d_out}
    hooks = (converted.hook_in, converted.hook_out)
    files = _write(directory, form, config, _metadata(subject, hooks, model_name))
    costs = {} if converted.cost is None else {subject.site["name"]: converted.cost}
    return Written(files, costs, attaching(subject, *hooks))


def hook_names(subject: Subject, hooks: Iterable[str]) -> list[str]:
    """Return hooks by the names that are written: those of ``HookedSAETransformer``, or our own where it has none."""
    return [hooked_transformer_name(hook, subject.model) or hook for hook in hooks]


def attaching(subject: Subject, hook_in: str, hook_out: str) -> list[str]:
    """Return sentences on where SAELens can attach a transcoder of these hooks, and on what it then leaves out."""
    names = {hook: hooked_transformer_name(hook, subject.model) for hook in (hook_in, hook_out)}
    notes = [
        f"{hook}: HookedSAETransformer {why_unnamed(hook, subject.model)}. It passes over hooks that it does not have "
        "with a line in its log, and the loss is the model's own; attach this one in SAETransformerBridge (SAELens "
        f"from {ATTACHES_FROM} on, TransformerLens 3)"
        for hook, name in names.items()
        if name is None
    ]
    adds = f", which adds {hook_in}" if str(names[hook_in]).endswith(f".{MLP_IN}") else ""
    if None not in names.values() and (adds or not subject.is_autoencoder):
        notes.append(f"attach it in HookedSAETransformer of SAELens {ATTACHES_FROM} or later{adds} (docs/export.md)")
    if subject.skips:
        notes.append(
            f"SAELens, up to {FORMAT_OF} at least, leaves out the path past the features of a transcoder it attaches; "
            "run this one with hooks, as docs/export.md shows"
        )
    return [f"{subject.site['name']}: {note}" for note in notes]


def _write(directory: Path, form: JumpForm, config: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    tensors: dict[str, Tensor | None] = {
        "W_enc": form.W_enc.T,
        "b_enc": form.b_enc,
        "W_dec": form.W_dec,
        "b_dec": form.b_dec,
        "threshold": form.threshold,
        "W_skip": form.W_skip,
    }
    write_tensors(directory / WEIGHTS, present(tensors))
    # Last: without it there is no folder of SAELens here.
    write_json(
        directory / CONFIG,
        {
            **config,
            "d_in": form.d_in,
            "d_sae": form.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": metadata,
        },
    )
    return [CONFIG, WEIGHTS]


def _metadata(subject: Subject, hooks: tuple[str, str], model_name: str) -> dict[str, Any]:
    name_in, name_out = hook_names(subject, hooks)
    return {
        "sae_lens_version": FORMAT_OF,
        "sae_lens_training_version": None,
        "model_name": model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {} if subject.is_raw else dict.fromkeys(_COMPATIBILITY, True),
        "hook_name": name_in,
        "hook_name_out": name_out,
        "hook_head_index": None,
        "prepend_bos": True,
    }


def read(folder: Path) -> Foreign:
    """Read a folder of release 6 or later.

    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch with everything in it that has no counterpart here.
    """
    config = read_config(folder / CONFIG)
    kind = str(config.get("architecture"))
    metadata = config.get("metadata") or {}
    if problems := _config_problems(kind, config, metadata):
        raise ArtifactMismatch(f"{folder / CONFIG}: cannot be imported: {'; '.join(problems)}")
    jumps, skips = "jumprelu" in kind, "skip" in kind
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if jumps else []), *(["W_skip"] if skips else [])]
    tensors = read_tensors(folder / WEIGHTS)
    check_names(folder / WEIGHTS, tensors, wanted)
    W_enc, b_enc, W_dec = tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"]
    # Its default for autoencoders is to subtract the output bias from the input; transcoders never do.
    if config.get("apply_b_dec_to_input", True) and kind in AUTOENCODERS:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    if config.get("rescale_acts_by_decoder_norm"):
        # It ranks and shows activations times the decoder norm, and divides again before decoding.
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    weights: dict[str, Tensor] = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec_out": tensors["b_dec"]}
    if jumps:
        weights["log_threshold"] = log_threshold(folder, tensors["threshold"])
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    hook_in = metadata.get("hook_name")
    return Foreign(
        architecture=_architecture(jumps, skips, config),
        weights=weights,
        hook_in=hook_in,
        hook_out=metadata.get("hook_name_out") if kind in TRANSCODERS else hook_in,
        model_name=metadata.get("model_name"),
        facts=jsonable(config),
    )


def _config_problems(kind: str, config: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    known = (*TRANSCODERS, *AUTOENCODERS)
    problems = [] if kind in known else [f"architecture {kind!r} is none of {', '.join(known)}"]
    for name in ("normalize_activations", "reshape_activations"):
        if (value := config.get(name, "none")) != "none":
            problems.append(f"{name} is {value!r}, which has to be folded into the weights in SAELens first")
    if metadata.get("hook_head_index") is not None:
        problems.append(f"it reads head {metadata['hook_head_index']} only, which a site names as HOOK[HEAD]")
    if kind in TRANSCODERS and config.get("apply_b_dec_to_input", False):
        problems.append("apply_b_dec_to_input is true, which SAELens itself refuses for transcoders")
    return problems


def _architecture(jumps: bool, skips: bool, config: dict[str, Any]) -> Architecture:
    if jumps:
        return JumpReLU(skip=skips)
    if config["architecture"] == "topk":
        return TopK(k=config["k"])
    return ReLU(input_bias=False, skip=skips)
