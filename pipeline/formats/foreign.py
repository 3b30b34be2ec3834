"""A transcoder read from another tool's files, in our terms: which architecture, which weights, which hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing
from tailrace.training.architectures import Architecture
from tailrace.training.architectures.base import Transcoder

SMALLEST_THRESHOLD = torch.finfo(torch.float32).tiny
"""Stands for a threshold of zero, whose logarithm we could not keep."""


@dataclass(frozen=True)
class Foreign:
    """What a reader found."""

    architecture: Architecture
    weights: dict[str, Tensor]
    """By the names of our own modules: ``W_enc`` (d_sae, d_in), ``b_enc``, ``W_dec`` (d_sae, d_out), ``b_dec_out``, and
    what the architecture has besides. An input bias is folded in."""
    hook_in: str | None
    """TransformerLens's name of what it reads; None if the files do not say."""
    hook_out: str | None
    """… and of what it writes; the same hook for an autoencoder."""
    model_name: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the files say of themselves, as JSON; for the record only."""
    processing: str | None = None
    """What was done to the language model's weights when it was trained (``raw``, ``compatibility``), where known."""

    def build(self, where: Path) -> Transcoder:
        """Return the module with these weights.

        Raises ArtifactCorrupt with every weight that is missing, is not finite or has another shape.
        """
        d_sae, d_in = self.weights["W_enc"].shape
        module = self.architecture.build(d_in, self.weights["W_dec"].shape[1], d_sae)
        module.b_dec = None
        own = module.state_dict()
        problems = []
        for name in sorted(own.keys() | self.weights.keys()):
            if name not in self.weights:
                problems.append(f"{name} is missing")
            elif name not in own:
                problems.append(f"{name} belongs to no {self.architecture.model_dump()['kind']}")
            elif own[name].shape != self.weights[name].shape:
                shapes = tuple(self.weights[name].shape), tuple(own[name].shape)
                problems.append(f"{name} has shape {shapes[0]}, the others make it {shapes[1]}")
            elif not bool(torch.isfinite(self.weights[name]).all()):
                problems.append(f"{name} holds NaN or infinity")
        if problems:
            raise ArtifactCorrupt(f"{where}: is no usable transcoder: {'; '.join(problems)}; get the files again")
        module.load_state_dict(self.weights)
        return module.eval().requires_grad_(False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32. Raises ArtifactMissing or ArtifactCorrupt."""
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as safetensors ({error}); get the file again") from error
    return {name: tensor.to(torch.float32) for name, tensor in loaded.items()}


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises ArtifactMissing or ArtifactCorrupt."""
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ArtifactCorrupt(f"{path}: holds {type(content).__name__}, wanted an object of settings; get it again")
    return content


def check_names(where: Path, found: Mapping[str, Tensor], wanted: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise ArtifactMismatch, naming all of them, for tensors that are missing or that nothing here understands."""
    missing = sorted(set(wanted) - found.keys())
    unknown = sorted(found.keys() - set(wanted) - set(optional))
    problems = [f"has no {', '.join(missing)}"] if missing else []
    problems += [f"holds {', '.join(unknown)}, which would be ignored"] if unknown else []
    if problems:
        raise ArtifactMismatch(
            f"{where}: {' and '.join(problems)}; wanted {', '.join(wanted)} and nothing else"
            + (f" but {', '.join(optional)}" if optional else "")
            + "; check --from"
        )
    flat = [name for name in wanted if found[name].ndim != (2 if name.startswith("W_") or "weight" in name else 1)]
    if flat:
        shapes = ", ".join(f"{name} {tuple(found[name].shape)}" for name in flat)
        raise ArtifactCorrupt(f"{where}: {shapes}: wanted matrices and vectors; get the file again")


def log_threshold(where: Path, threshold: Tensor) -> Tensor:
    """Return log θ, (d_sae,). Raises ArtifactMismatch for a threshold below zero, which lets negative values fire."""
    if bool((threshold < 0).any()):
        n_below = int((threshold < 0).sum())
        raise ArtifactMismatch(
            f"{where}: {n_below} thresholds are below zero, so features would fire with negative activations; "
            "such transcoders cannot be imported"
        )
    return threshold.double().clamp(min=SMALLEST_THRESHOLD).log().float()


def without_input_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Return the encoder bias of x for one of x − b_dec: b_enc − W_enc b_dec, (d_sae,); in float64, rounded once."""
    return (b_enc.double() - W_enc.double() @ b_dec.double()).float()


def jsonable(value: Any) -> Any:
    """Return a setting as JSON: what is no number, text, list or mapping as its text, NaN as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return str(value)
