"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors``, encoder stored input-major.

Three things its reader does that a writer must know: without ``metadata.sae_lens_version`` it takes the folder for one
of an old release and drops the metadata; transcoders must say ``apply_b_dec_to_input: false``; and it has no TopK
transcoder, so TopK is written as JumpReLU. A TopK autoencoder it has, with k.

Hooks are named as ``HookedSAETransformer`` has them: one it does not have it skips with a line in the log, and the loss
is then the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.formats.conversion import (
    Converted,
    Written,
    is_raw,
    needs_calibration,
    present,
    write_json,
)
from tailrace.pipeline.formats.foreign import (
    Foreign,
    Key,
    Keys,
    Shapes,
    check_tensors,
    jsonable,
    keys_of,
    kind_problems,
    log_threshold_of_relu,
    read_config,
    read_keys,
    read_log_sparsity,
    read_tensors,
    refuse,
    without_input_bias,
)
from tailrace.pipeline.formats.hooks import MLP_IN, hooked_transformer_name, is_normalised_otherwise, why_unnamed
from tailrace.pipeline.formats.jump_form import JumpForm, jump_form
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.artifact import Inputs
from tailrace.storage.cache_format import HookName
from tailrace.training.architectures import Architecture, JumpReLU, ReLU, TopK
from tailrace.training.architectures.transcoder import write_tensors

FORMAT_OF = "6.54.12"
"""The release of SAELens whose reader this was written for and tested with."""
ATTACHES_FROM = "6.34"
"""The first release that puts a transcoder's output where it belongs; earlier ones put it where its input is read."""
FIRST_RELEASE, WITH_SKIP_AND_THRESHOLD = "6.0", "6.24"
"""The first releases that read what is written here."""
_HEADS, _PER_HEAD = "attn.hook_z", ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
"""Hooks that hold a dimension of heads there, and the one of them that SAELens itself lays side by side."""
CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"

_COMPATIBILITY = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What ``HookedTransformer`` did to a model's weights by default, and what our ``compatibility`` stands for."""

_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""What releases called a factor per feature for decoding; ones where it is not used."""

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
AUTOENCODERS = ("standard", "jumprelu", "topk")

FORMER = {
    "activation_fn_str": "activation_fn",
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "hook_point_eval": "hook_eval",
}
"""Names of keys in releases 2 to 5 → later ones."""
KEYS: Keys = {
    "architecture": Key("which kind it is", "standard", (*TRANSCODERS, *AUTOENCODERS)),
    "activation_fn": Key("what becomes of pre-activations, in releases 2 to 5", "relu", ("relu", "topk")),
    "activation_fn_kwargs": Key("k, in releases 2 to 5", kind=dict),
    "k": Key("how many features fire on a row"),
    "rescale_acts_by_decoder_norm": Key("activations are ranked by what they write", False),
    "apply_b_dec_to_input": Key("whether an autoencoder's output bias is taken off its input", True),
    "finetuning_scaling_factor": Key("whether decoding uses a factor per feature; release 2 always did", True),
    "normalize_activations": Key("inputs rescaled: fold it into the weights in SAELens first", None, (None,)),
    "reshape_activations": Key("heads side by side, as a site of attn.hook_z has them", None, (None, "hook_z")),
    "metadata": Key("where it belongs, from release 6 on", kind=dict),
    "model_from_pretrained_kwargs": Key("where it belongs", kind=dict),
    **keys_of("where it belongs", "hook_name hook_name_out model_name", str),
    **keys_of("where it belongs", "hook_head_index hook_head_index_out", int),
    **keys_of(
        "where it belongs",
        "hook_layer hook_layer_out hook_eval hf_hook_name hf_hook_name_out model_class_name model_kwargs "
        "neuronpedia_id sae_lens_version sae_lens_training_version",
    ),
    **keys_of("shapes and types, which the weights have themselves", "d_in d_sae d_out dtype device expansion_factor"),
    **keys_of(
        "the text it was trained on",
        "context_size prepend_bos dataset_path dataset_trust_remote_code streaming is_dataset_tokenized "
        "seqpos_slice exclude_special_tokens use_chat_formatting disable_concat_sequences "
        "sequence_separator_token use_cached_activations cached_activations_path",
    ),
    **keys_of(
        "how it was trained",
        "l1_coefficient l1_warm_up_steps l0_coefficient l0_warm_up_steps lp_norm "
        "scale_sparsity_penalty_by_decoder_norm mse_loss_normalization aux_loss_coefficient "
        "pre_act_loss_coefficient target_l0 use_ghost_grads noise_scale normalize_sae_decoder b_dec_init_method "
        "decoder_orthogonal_init decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm "
        "init_encoder_as_decoder_transpose from_pretrained_path jumprelu_init_threshold jumprelu_bandwidth "
        "jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input use_sparse_activations adam_beta1 "
        "adam_beta2 lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles "
        "finetuning_tokens finetuning_method training_tokens train_batch_size_tokens store_batch_size_prompts "
        "n_batches_in_buffer activations_mixing_fraction n_batches_for_norm_estimate feature_sampling_window "
        "dead_feature_window dead_feature_threshold n_eval_batches eval_batch_size_prompts seed tokens_per_buffer",
    ),
    **keys_of(
        "the machine, the log and the checkpoints of the run",
        "autocast autocast_lm compile_llm llm_compilation_mode compile_sae sae_compilation_mode act_store_device "
        "llm_device prefetch_llm_batches log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb "
        "log_weights_to_wandb wandb_project wandb_id wandb_entity wandb_log_frequency eval_every_n_wandb_logs "
        "run_name resume resume_from_checkpoint n_checkpoints checkpoint_path save_final_checkpoint output_path "
        "verbose",
    ),
}
"""Of cfg.json, of releases 2.1 to 6.54."""


class TrainedOn(NamedTuple):
    """What is known of the text and the positions that a transcoder was trained on."""

    context_length: int
    first_position: int
    """Positions before this one were left out."""
    without_special_tokens: bool
    dataset: str | None
    """On a hub; None for files of a machine."""


def trained_on(inputs: Inputs, cache: ActivationCache | None) -> TrainedOn | None:
    """Return what a live run recorded, or what ``cache`` says if it is the cache that was trained on; else None."""
    if inputs.live is not None:
        packing, text = inputs.live["packing"], inputs.live["text"]
        rows = packing
    elif cache and inputs.cache and inputs.imported is None and inputs.cache.cache_id == cache.cache_id:
        packing, text = cache.manifest.packing, cache.manifest.text
        rows = packing["row_filter"]
    else:
        return None
    return TrainedOn(
        context_length=packing["context_length"],
        first_position=max(rows["first_position"], 0 if rows["exclude"] == "none" else 1),
        without_special_tokens=rows["exclude"] == "special",
        dataset=text.get("dataset") if text.get("source") != "local" else None,
    )


def problems(layers: Sequence[TranscoderLayer]) -> list[str]:
    """Return a sentence for everything that keeps these transcoders from being written."""
    if len(layers) > 1:
        return [f"a SAELens folder holds one transcoder, {len(layers)} were given; export each to a folder of its own"]
    return [
        f"{one.path}: is an autoencoder with a path past its features, which SAELens has for transcoders only"
        for one in layers
        if one.is_autoencoder and one.skips
    ]


def is_topk_autoencoder(layer: TranscoderLayer) -> bool:
    """Tell whether SAELens has this transcoder's own rule, so that no threshold must stand in for k."""
    return layer.is_autoencoder and needs_calibration(layer)


def write_topk_autoencoder(directory: Path, layer: TranscoderLayer, model_name: str, text: TrainedOn | None) -> Written:
    """Write a TopK autoencoder with its k."""
    form = jump_form(layer.load(), torch.zeros(layer.d_sae))
    config = {"architecture": "topk", "k": layer.k, "rescale_acts_by_decoder_norm": False}
    hooks = (layer.site.hook_in, layer.site.hook_out)
    files = _write(directory, form, config, _metadata(layer, hooks, model_name, text))
    return Written(files, {}, [*attaching(layer, *hooks), *_notes_on_text(layer, text)])


def write(directory: Path, converted: Converted, model_name: str, text: TrainedOn | None) -> Written:
    """Write a transcoder or autoencoder; what the thresholds cost, and where it attaches, is returned too."""
    form, layer = converted.form, converted.layer
    if layer.is_autoencoder:
        config: dict[str, Any] = {"architecture": "standard" if form.threshold is None else "jumprelu"}
    else:
        kind = ("jumprelu_" if form.threshold is not None else "") + ("skip_" if form.W_skip is not None else "")
        config = {"architecture": f"{kind}transcoder", "d_out": form.d_out}
    hooks = (converted.hook_in, converted.hook_out)
    files = _write(directory, form, config, _metadata(layer, hooks, model_name, text))
    costs = {} if converted.cost is None else {layer.site.name: converted.cost}
    return Written(files, costs, [*attaching(layer, *hooks), *_notes_on_text(layer, text)])


def hook_names(layer: TranscoderLayer, hooks: Iterable[str]) -> list[str]:
    """Return hooks by the names that are written: those of ``HookedSAETransformer``, or our own where it has none."""
    return [hooked_transformer_name(hook, layer.model) or hook for hook in hooks]


def written_hooks(layer: TranscoderLayer, hooks: Sequence[str]) -> list[str]:
    """Return what the files say of the hooks: their names, and what has to be done for them to hold our vectors."""
    names = hook_names(layer, hooks)
    return [
        *names,
        *(["reshape_activations"] if _has_heads_side_by_side(names) else []),
        *_processing_for(layer, hooks),
    ]


def _has_heads_side_by_side(names: Iterable[str]) -> bool:
    """Tell whether SAELens has to lay heads side by side, which it can for what both reads and writes ``hook_z``."""
    return all(name.endswith(_HEADS) for name in names)


def _processing_for(layer: TranscoderLayer, hooks: Iterable[str]) -> dict[str, bool]:
    """Return how the model has to be loaded for its hooks to hold what ours hold, in every release of TransformerLens.

    A norm's output before the gain is what every release has where the gain is folded into what follows.
    """
    if not is_raw(layer):
        return dict.fromkeys(_COMPATIBILITY, True)
    return {"fold_ln": True} if any(is_normalised_otherwise(hook, layer.model) for hook in hooks) else {}


def attaching(layer: TranscoderLayer, hook_in: str, hook_out: str) -> list[str]:
    """Return sentences on where SAELens can attach a transcoder of these hooks, and on what it then leaves out."""
    names = {hook: hooked_transformer_name(hook, layer.model) for hook in (hook_in, hook_out)}
    notes = [
        f"{hook}: HookedSAETransformer {why_unnamed(hook, layer.model)}. It passes over hooks that it does not have "
        "with a line in its log, and the loss is the model's own; attach this one in SAETransformerBridge (SAELens "
        f"from {ATTACHES_FROM} on, TransformerLens 3)"
        for hook, name in names.items()
        if name is None
    ]
    adds = f", which adds {hook_in}" if str(names[hook_in]).endswith(f".{MLP_IN}") else ""
    if None not in names.values() and (adds or not layer.is_autoencoder):
        notes.append(f"attach it in HookedSAETransformer of SAELens {ATTACHES_FROM} or later{adds} (docs/export.md)")
    if adds:
        notes.append(f"HookedTransformer itself has no {hook_in}; --fold-norm exports with hooks that it has")
    written = hook_names(layer, (hook_in, hook_out))
    if per_head := [name for name in written if name.endswith(_PER_HEAD) and not _has_heads_side_by_side(written)]:
        notes.append(
            f"{per_head[0]}: SAELens lays no heads side by side here; flatten the last two dimensions yourself"
        )
    if asked := _processing_for(layer, (hook_in, hook_out)):
        notes.append(f"load the model with model_from_pretrained_kwargs of its metadata: {', '.join(asked)}")
    from_release = WITH_SKIP_AND_THRESHOLD if layer.skips and layer.kind != "relu" else FIRST_RELEASE
    notes.append(f"read by SAELens from {from_release} on")
    if layer.skips:
        notes.append(
            f"SAELens, up to {FORMAT_OF} at least, leaves out the path past the features of a transcoder it attaches; "
            "run this one with hooks, as docs/export.md shows"
        )
    if not layer.is_autoencoder:
        notes.append(
            f"SAELens' evals, up to {FORMAT_OF} at least, compare what a transcoder gives with what it reads, so their "
            "reconstruction scores mean nothing; pipeline evaluate compares it with the outputs"
        )
    return [f"{layer.site.name}: {note}" for note in notes]


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
    reshaped = _has_heads_side_by_side([metadata["hook_name"], metadata["hook_name_out"]])
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
            "reshape_activations": "hook_z" if metadata["hook_head_index"] is None and reshaped else "none",
            "metadata": metadata,
        },
    )
    return [CONFIG, WEIGHTS]


def _notes_on_text(layer: TranscoderLayer, text: TrainedOn | None) -> list[str]:
    if text is not None:
        return []
    return [
        f"{layer.site.name}: the files lack the length of contexts, which SAELens' ActivationsStore needs; the "
        "cache that it was trained on says it: give --cache"
    ]


def _metadata(
    layer: TranscoderLayer, hooks: tuple[str, str], model_name: str, text: TrainedOn | None
) -> dict[str, Any]:
    read, written = (HookName.parse(name) for name in hook_names(layer, hooks))
    about = (
        {}
        if text is None
        else {
            "context_size": text.context_length,
            "seqpos_slice": [text.first_position, None] if text.first_position else [None],
            "exclude_special_tokens": text.without_special_tokens,
            "dataset_path": text.dataset,
        }
    )
    return {
        "sae_lens_version": FORMAT_OF,
        "sae_lens_training_version": None,
        "model_name": model_name,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": _processing_for(layer, hooks),
        "hook_name": read.point,
        "hook_name_out": written.point,
        "hook_head_index": read.head,
        **({} if written.head is None else {"hook_head_index_out": written.head}),
        "prepend_bos": True,
        **about,
    }


def _shapes(kind: str) -> Shapes:
    """Return the tensors of a kind and their dimensions."""
    d_out = "d_out" if kind in TRANSCODERS else "d_in"
    return {
        "W_enc": ("d_in", "d_sae"),
        "b_enc": ("d_sae",),
        "W_dec": ("d_sae", d_out),
        "b_dec": (d_out,),
        **({"threshold": ("d_sae",)} if "jumprelu" in kind else {}),
        **({"W_skip": (d_out, "d_in")} if "skip" in kind else {}),
    }


def read(folder: Path) -> Foreign:
    """Read a folder of release 2 or later.

    Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch with everything in it that has no counterpart here.
    """
    path = folder / CONFIG
    config = read_config(path)
    said = read_keys(path, config, KEYS, FORMER)
    # From release 6 on, what says nothing of the weights lies in metadata, which may hold anything.
    about = {**said, **{name: value for name, value in (said["metadata"] or {}).items() if value is not None}}
    refuse(path, kind_problems(about, KEYS))
    kind, k = _kind(path, config, said)
    jumps, skips, transcodes = "jumprelu" in kind, "skip" in kind, kind in TRANSCODERS
    optional: Shapes = dict.fromkeys(_FACTORS, ("d_sae",))
    tensors = check_tensors(folder / WEIGHTS, read_tensors(folder / WEIGHTS), _shapes(kind), optional)
    W_enc, b_enc, W_dec = tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"]
    for factor in (tensors[name] for name in _FACTORS if name in tensors):
        if said["finetuning_scaling_factor"]:
            W_dec = W_dec * factor[:, None]
        elif bool((factor != 1).any()):
            refuse(path, [f"finetuning_scaling_factor is false, and {WEIGHTS} holds factors other than 1"])
    if said["apply_b_dec_to_input"] and not transcodes:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    if said["rescale_acts_by_decoder_norm"]:
        # It ranks and shows activations times the decoder norm, and divides again before decoding.
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    weights: dict[str, Tensor] = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec_out": tensors["b_dec"]}
    if jumps:
        weights["log_threshold"] = log_threshold_of_relu(tensors["threshold"])
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    hook_in = _hook(about["hook_name"], about["hook_head_index"])
    architecture: Architecture = ReLU(input_bias=False, skip=skips)
    if jumps:
        architecture = JumpReLU(skip=skips)
    elif k is not None:
        architecture = TopK.read({"k": k}, where=str(path))
    return Foreign(
        architecture=architecture,
        weights=weights,
        hook_in=hook_in,
        hook_out=_hook(about["hook_name_out"], about["hook_head_index_out"]) if transcodes else hook_in,
        model_name=about["model_name"],
        facts=jsonable(config),
        processing=_processing(about),
        log_sparsity=read_log_sparsity(folder / SPARSITY, len(b_enc)),
    )


def _kind(path: Path, config: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the architecture, and k of TopK. Raises ArtifactMismatch for keys that contradict each other."""
    kind, problems = said["architecture"], []
    k = said["k"] if said["k"] is not None else _k_of_releases_before_6(path, said["activation_fn_kwargs"])
    if said["activation_fn"] == "topk":
        if kind not in ("standard", "topk"):
            problems.append(f"activation_fn is 'topk' in a {kind}, which has a threshold or a path past its features")
        kind = "topk"
    if kind == "topk" and (not isinstance(k, int) or k < 1):
        problems.append(f"k is {k!r}, wanted a number of features from 1 on")
    if kind in TRANSCODERS and config.get("apply_b_dec_to_input"):
        problems.append("apply_b_dec_to_input is true, which SAELens itself refuses for transcoders")
    refuse(path, problems)
    return kind, k if kind == "topk" else None


def _k_of_releases_before_6(path: Path, settings: Mapping[str, Any] | None) -> Any:
    known = {
        "k": Key("how many features fire on a row"),
        "signed": Key("whether values below zero fire too", False, (False,)),
    }
    return read_keys(path, settings or {}, known)["k"]


def _processing(about: Mapping[str, Any]) -> str | None:
    """Return what was done to the language model's weights, where the files say so."""
    asked = about["model_from_pretrained_kwargs"] or {}
    version = str(about["sae_lens_version"] or about["sae_lens_training_version"])
    # Release 2 loaded models as HookedTransformer does by itself; later ones do nothing that they are not asked for.
    return "compatibility" if version.startswith("2.") or any(asked.get(name) for name in _COMPATIBILITY) else None


def _hook(name: str | None, head: int | None) -> str | None:
    return None if name is None else str(HookName(name, head))
