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
from typing import Any

import torch

from tailrace.pipeline.formats.foreign import (
    Foreign,
    check_names,
    jsonable,
    read_config,
    read_tensors,
    without_input_bias,
)
from tailrace.pipeline.formats.hooks import module_of
from tailrace.pipeline.formats.subjects import Subject, present, write_json
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.names import folder_problem
from tailrace.training.architectures import TopK
from tailrace.training.architectures.transcoder import write_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_MLP = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp")


def problems(subjects: Sequence[Subject], module: str | None) -> list[str]:
    """Return a sentence for everything that keeps these transcoders from being written."""
    found = [line for one in subjects for line in _problems(one, module)]
    if module is not None and (problem := folder_problem(module)) is not None:
        found.append(f"--module {module}: names a folder of the export and {problem}; give one such as layers.3.mlp")
    if module is not None and len(subjects) > 1:
        found.append(
            f"--module {module} names one place, {len(subjects)} transcoders were given; export each by itself"
        )
    folders = [named for one in subjects if (named := module or module_of(one.site, one.model)) is not None]
    if module is None and len(set(folders)) < len(folders):
        found.append("two of the transcoders belong to one module, and a folder holds one; leave one out")
    return found


def _problems(subject: Subject, module: str | None) -> list[str]:
    kind, site = subject.kind, subject.site
    found = []
    if kind != "topk":
        found.append(f"{subject.path}: is {kind}, and sparsify has TopK only; export to saelens or circuit-tracer")
    if site["d_in"] != site["d_out"]:
        found.append(f"{subject.path}: maps width {site['d_in']} to {site['d_out']}; sparsify holds one width only")
    if not subject.is_raw:
        found.append(
            f"{subject.path}: was trained on a language model whose norms are folded into its weights "
            "(processing compatibility); sparsify runs the model as published, where a module holds other vectors"
        )
    if module is None and module_of(site, subject.model) is None:
        found.append(
            f"{subject.path}: its site, {site['hook_in']} to {site['hook_out']}, is not known to be the input and "
            f"output of a module of {subject.model.get('architecture', 'this model')}; if it is, name it with --module"
        )
    return found


@torch.no_grad()
def write(directory: Path, subject: Subject, module: str | None) -> list[str]:
    """Write one transcoder below ``directory``; return the names of its files."""
    folder = module or module_of(subject.site, subject.model)
    assert folder is not None
    transcoder = subject.load()
    b_enc, b_dec = transcoder.encoder_bias(), transcoder.b_dec_out
    if subject.is_autoencoder:
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
            "k": subject.manifest["architecture"]["k"],
            "multi_topk": False,
            "skip_connection": transcoder.W_skip is not None,
            "transcode": not subject.is_autoencoder,
            "d_in": transcoder.d_in,
        },
    )
    return [f"{folder}/{CONFIG}", f"{folder}/{WEIGHTS}"]


def read(folder: Path) -> Foreign:
    """Read a folder. Raises ArtifactMissing, ArtifactCorrupt, or ArtifactMismatch for what has no counterpart here."""
    config = read_config(folder / CONFIG)
    if problems := _config_problems(config):
        raise ArtifactMismatch(f"{folder / CONFIG}: cannot be imported: {'; '.join(problems)}")
    tensors = read_tensors(folder / WEIGHTS)
    skips = bool(config.get("skip_connection", False))
    wanted = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skips else [])]
    check_names(folder / WEIGHTS, tensors, wanted)
    W_enc, b_enc = tensors["encoder.weight"], tensors["encoder.bias"]
    transcodes = bool(config.get("transcode", False))
    if not transcodes:
        b_enc = without_input_bias(W_enc, b_enc, tensors["b_dec"])
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec_out": tensors["b_dec"]}
    if skips:
        weights["W_skip"] = tensors["W_skip"]
    match = _MLP.fullmatch(folder.resolve().name)
    block = None if match is None else f"blocks.{match[1]}.mlp"
    return Foreign(
        architecture=TopK(k=config["k"], skip=skips),
        weights=weights,
        hook_in=None if block is None else f"{block}.{'hook_in' if transcodes else 'hook_out'}",
        hook_out=None if block is None else f"{block}.hook_out",
        facts=jsonable(config),
    )


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if (activation := config.get("activation", "topk")) != "topk":
        problems.append(f"activation is {activation!r}, wanted topk")
    if not isinstance(config.get("k"), int) or config["k"] < 1:
        problems.append(f"k is {config.get('k')!r}, wanted a number of features")
    return problems
