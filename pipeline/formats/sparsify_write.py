"""sparsify's folders: ``<module>/cfg.json`` and ``<module>/sae.safetensors``, named by Hugging Face module.

It has TopK only, reads a module's input and predicts its output, and both have one width. An autoencoder there takes
its output bias off the input first; ours does not, so the bias is put back into the encoder: W (x − b) + (c + W b).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tailrace.pipeline.formats.hooks import module_of
from tailrace.pipeline.formats.subjects import Subject
from tailrace.pipeline.formats.tensor_files import present, write_json, write_tensors
from tailrace.storage.names import folder_problem

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


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
