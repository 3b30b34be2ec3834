"""sparsify's folders: ``<module>/cfg.json`` and ``<module>/sae.safetensors``, named by Hugging Face module.

It has TopK only, reads a module's input and predicts its output, and both have one width. An autoencoder there takes
its output bias off the input first; ours does not, so the bias is put back into the encoder: W (x − b) + (c + W b).

Reading, the same the other way round: a transcoder reads the module's input and predicts its output; an autoencoder
reads and predicts the output, and takes its output bias off first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.formats.conversion import is_raw, present, write_json
from tailrace.pipeline.formats.foreign import (
    Foreign,
    Key,
    Keys,
    Shapes,
    check_tensors,
    jsonable,
    keys_of,
    read_config,
    read_keys,
    read_tensors,
    refuse,
    without_input_bias,
)
from tailrace.pipeline.formats.hooks import MLP_IN, MLP_OUT, RESID_POST, module_of
from tailrace.storage.names import folder_problem
from tailrace.training.architectures import TopK
from tailrace.training.architectures.transcoder import write_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NOTE_ON_RELEASES = "read by sparsify (eai-sparsify) from 1.0 on"

_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?")


def problems(layers: Sequence[TranscoderLayer], module: str | None) -> list[str]:
    """Return a sentence for everything that keeps these transcoders from being written."""
    found = [line for one in layers for line in _problems(one, module)]
    if module is not None and (problem := folder_problem(module)) is not None:
        found.append(f"--module {module}: names a folder of the export and {problem}; give one such as layers.3.mlp")
    if module is not None and len(layers) > 1:
        found.append(f"--module {module} names one module, {len(layers)} transcoders were given; export each by itself")
    folders = [named for one in layers if (named := module or module_of(one.site, one.model)) is not None]
    if module is None and len(set(folders)) < len(folders):
        found.append("two of the transcoders belong to one module, and a folder holds one; leave one out")
    return found


def _problems(layer: TranscoderLayer, module: str | None) -> list[str]:
    path, site, found = layer.path, layer.site, []
    if layer.kind != "topk":
        found.append(f"{path}: is {layer.kind}, and sparsify has TopK only; export to saelens or circuit-tracer")
    if site.d_in != site.d_out:
        found.append(f"{path}: maps width {site.d_in} to {site.d_out}; sparsify holds one width only")
    if not is_raw(layer):
        found.append(
            f"{path}: was trained on a language model whose norms are folded into its weights "
            "(processing compatibility); sparsify runs the model as published, where a module holds other vectors"
        )
    if module is None and module_of(site, layer.model) is None:
        found.append(
            f"{path}: its site, {site.hook_in} to {site.hook_out}, is not known to be the input and output of a module "
            f"of {layer.model.get('architecture', 'this model')}; if it is, name it with --module"
        )
    return found


@torch.no_grad()
def write(directory: Path, layer: TranscoderLayer, module: str | None) -> list[str]:
    """Write one transcoder below ``directory``; return the names of its files."""
    folder = module or module_of(layer.site, layer.model)
    assert folder is not None
    transcoder = layer.load()
    b_enc, b_dec = transcoder.encoder_bias(), transcoder.b_dec_out
    if layer.is_autoencoder:
        b_enc = (b_enc.double() + transcoder.W_enc.double() @ b_dec.double()).float()
    (directory / folder).mkdir(exist_ok=True)
    tensors = {
        "encoder.weight": transcoder.W_enc,
        "encoder.bias": b_enc,
        "W_dec": transcoder.W_dec,
        "b_dec": b_dec,
        "W_skip": transcoder.W_skip,
    }
    write_tensors(directory / folder / WEIGHTS, present(tensors))
    write_json(
        directory / folder / CONFIG,
        {
            "activation": "topk",
            "expansion_factor": max(1, transcoder.d_sae // transcoder.d_in),
            "normalize_decoder": True,
            "num_latents": transcoder.d_sae,
            "k": layer.k,
            "multi_topk": False,
            "skip_connection": transcoder.W_skip is not None,
            "transcode": not layer.is_autoencoder,
            "d_in": transcoder.d_in,
        },
    )
    return [f"{folder}/{CONFIG}", f"{folder}/{WEIGHTS}"]


_OTHER_FUNCTION = "no counterpart here"
_KEYS: Keys = {
    "activation": Key(_OTHER_FUNCTION, "topk", ("topk",)),
    "k": Key("how many features fire on a row"),
    "skip_connection": Key("whether a path goes past the features", False),
    "transcode": Key("whether it reads the module's input; files from before February 2025 do not say"),
    "signed": Key("whether values below zero fire too; of 2024", False, (False,)),
    "embed_skip": Key(_OTHER_FUNCTION, False, (False,)),
    "gram_lookup": Key(_OTHER_FUNCTION, False, (False,)),
    **keys_of("shapes, which the weights have themselves", "d_in expansion_factor num_latents"),
    **keys_of("how it was trained", "normalize_decoder multi_topk"),
    **keys_of("of gram_lookup, which is off", "lookup_max_order gram_table_hash"),
}
"""Of sae 0.1 (2024), which sparsify was called before, to sparsify 1.3."""


def read(folder: Path) -> Foreign:
    """Read a folder. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    path = folder / CONFIG
    config = read_config(path)
    said = read_keys(path, config, _KEYS)
    if not isinstance(said["k"], int) or said["k"] < 1:
        refuse(path, [f"k is {said['k']!r}, wanted a number of features from 1 on"])
    skips = bool(said["skip_connection"])
    wanted: Shapes = {
        "encoder.weight": ("d_sae", "d_in"),
        "encoder.bias": ("d_sae",),
        "W_dec": ("d_sae", "d_in"),
        "b_dec": ("d_in",),
        **({"W_skip": ("d_in", "d_in")} if skips else {}),
    }
    tensors = check_tensors(folder / WEIGHTS, read_tensors(folder / WEIGHTS), wanted)
    W_enc, b_enc = tensors["encoder.weight"], tensors["encoder.bias"]
    # Until transcode was a key, a transcoder's output bias was taken off its input like an autoencoder's.
    is_older = "transcode" not in config
    if not said["transcode"]:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec_out": tensors["b_dec"]}
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    hook_in, hook_out = _hooks(folder.resolve().name, transcodes=bool(said["transcode"]) or (is_older and skips))
    return Foreign(
        architecture=TopK.read({"k": said["k"], "skip": skips}, where=str(path)),
        weights=weights,
        hook_in=hook_in,
        hook_out=hook_out,
        facts=jsonable(config),
        notes=_notes_on_age(hook_in, skips) if is_older else (),
    )


def _hooks(module: str, *, transcodes: bool) -> tuple[str | None, str | None]:
    """Return what a coder of a module reads and writes; None where the module's name is not known."""
    match = _MODULE.fullmatch(module)
    if match is None or (transcodes and match[2] is None):
        return None, None
    block = f"blocks.{match[1]}"
    if match[2] is None:
        return (f"{block}.{RESID_POST}",) * 2
    return f"{block}.{MLP_IN if transcodes else MLP_OUT}", f"{block}.{MLP_OUT}"


def _notes_on_age(hook_in: str | None, skips: bool) -> tuple[str, ...]:
    """Return a sentence on what was taken for granted of a file that does not say whether it is a transcoder."""
    if skips:
        return ("its files are from before February 2025; with a path past its features it is taken for a transcoder",)
    if hook_in is None:
        return ()
    return (
        f"its files do not say whether it reads the module's input or its output; it is taken for an autoencoder of "
        f"{hook_in}. If it is a transcoder, give its site with --site",
    )
