"""A transcoder read from another tool's files, in our terms: which architecture, which weights, which hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing
from tailrace.storage.parsing import parse_json, shown
from tailrace.training.architectures import Architecture
from tailrace.training.architectures.base import Transcoder

SMALLEST_THRESHOLD = torch.finfo(torch.float32).tiny
"""Stands for a threshold of zero, whose logarithm we could not keep."""


@dataclass(frozen=True)
class Key:
    """A key of another tool's configuration, as all of its releases write it."""

    meaning: str
    """What it does to the transcoder, or why it does nothing to it."""
    default: Any = None
    """What a file means that lacks the key or has null there."""
    wanted: tuple[Any, ...] | None = None
    """The values that are understood; None for any."""
    kind: type | None = None
    """What values are: ``str``, ``int``, ``float`` (or a whole number) or ``dict``; None for anything."""


Keys = Mapping[str, Key]
"""Every key of a format's configuration, in any of its releases."""


_KINDS = {str: "a text", int: "a whole number", float: "a number", dict: "settings by name"}


def keys_of(meaning: str, names: str, kind: type | None = None) -> dict[str, Key]:
    """Return keys of one meaning by their ``names``, with spaces between: any value of ``kind`` is as good as any."""
    return dict.fromkeys(names.split(), Key(meaning, kind=kind))


def read_keys(
    path: Path, config: Mapping[str, Any], known: Keys, former: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the value of every known key, its default where the file has none.

    ``former`` are names that keys had in earlier releases, with today's. Null, false and "none" are the same where the
    default is None. Raises ArtifactMismatch with every key that is not known and every value that is not wanted.
    """
    if not isinstance(config, dict):
        refuse(path, [f"it has {shown(config)}, wanted settings by name"])
    values, problems = {name: key.default for name, key in known.items()}, []
    names: dict[str, str] = {}
    for written, value in config.items():
        name = (former or {}).get(written, written)
        if name not in known:
            problems.append(
                f"{written} is {shown(value)}, a key that is not known here; if it changes nothing of what the "
                "transcoder computes, take it out of the file"
            )
            continue
        key = known[name]
        is_none = value is None or (key.default is None and (value is False or value == "none"))
        own = key.default if is_none else value
        if name in names and own != values[name]:
            problems.append(f"{names[name]} and {written} are the same key with two values; take the wrong one out")
        names[name], values[name] = written, own
        if key.wanted is not None and own not in key.wanted:
            wanted = ", ".join("none" if one is None else str(one) for one in key.wanted)
            problems.append(f"{written} is {shown(value)}, wanted {wanted} ({key.meaning})")
    refuse(path, [*problems, *kind_problems(values, known)])
    return values


def kind_problems(values: Mapping[str, Any], known: Keys) -> list[str]:
    """Return a sentence for each value that is neither its key's default nor of its key's kind."""
    return [
        f"{name} is {shown(value)}, wanted {_KINDS[kind]}"
        for name, value in values.items()
        if name in known and value is not None and value != known[name].default
        if (kind := known[name].kind) is not None
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind)
    ]


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise ArtifactMismatch with all problems of a configuration, if there are any."""
    if problems:
        raise ArtifactMismatch(f"{path}: cannot be imported: {'; '.join(problems)}")


@dataclass(frozen=True, kw_only=True)
class ForeignRecord:
    """What files say of a transcoder of one layer or several besides its weights."""

    architecture: Architecture
    model_name: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the files say of themselves, as JSON; for the record only."""
    processing: str | None = None
    """What was done to the language model's weights when it was trained (``raw``, ``compatibility``), where known."""
    notes: tuple[str, ...] = ()
    """Sentences a user should read: what had to be assumed."""
    log_sparsity: Tensor | None = None
    """(d_sae,) log10 of how often each feature fired when it was trained; None if the files do not say."""

    @property
    def recorded_architecture(self) -> dict[str, Any]:
        """The architecture as a manifest keeps it: what the files say and none of our defaults for training."""
        settings = self.architecture
        return {"kind": settings.model_dump()["kind"], **settings.model_dump(mode="json", exclude_unset=True)}


@dataclass(frozen=True, kw_only=True)
class Foreign(ForeignRecord):
    """A transcoder of one layer as a reader found it."""

    weights: dict[str, Tensor]
    """By the names of our own modules: ``W_enc`` (d_sae, d_in), ``b_enc``, ``W_dec`` (d_sae, d_out), ``b_dec_out``, and
    what the architecture has besides. An input bias is folded in."""
    hook_in: str | None
    """TransformerLens's name of what it reads; None if the files do not say."""
    hook_out: str | None
    """… and of what it writes; the same hook for an autoencoder."""

    n_layers: ClassVar = 1

    @property
    def hooks(self) -> list[tuple[str, str]] | None:
        """The pair of hooks; None if the files do not say both."""
        return None if self.hook_in is None or self.hook_out is None else [(self.hook_in, self.hook_out)]

    @property
    def widths(self) -> tuple[int, int]:
        """Widths by the weights' shapes."""
        return self.weights["W_enc"].shape[1], self.weights["W_dec"].shape[1]

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
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ArtifactCorrupt(f"{path}: holds {type(content).__name__}, wanted an object of settings; get it again")
    return content


Shapes = Mapping[str, tuple[str, ...]]
"""Names of tensors → the names of their dimensions."""


def check_tensors(
    where: Path, found: Mapping[str, Tensor], wanted: Shapes, optional: Shapes | None = None
) -> dict[str, Tensor]:
    """Return the tensors without leading dimensions of length 1 that they should not have.

    What a dimension is long, the first tensor says that has it, vectors before matrices. Raises ArtifactMismatch,
    naming all of them, for tensors that are missing or that nothing here understands; ArtifactCorrupt with every shape
    that does not fit the others.
    """
    known = {**wanted, **(optional or {})}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - known.keys())
    problems = [f"has no {', '.join(missing)}"] if missing else []
    problems += [f"holds {', '.join(unknown)}, which would be ignored"] if unknown else []
    if problems:
        raise ArtifactMismatch(
            f"{where}: {' and '.join(problems)}; wanted {', '.join(wanted)} and nothing else"
            + (f" but {', '.join(optional)}" if optional else "")
            + "; check --from"
        )
    lengths: dict[str, int] = {}
    tensors, problems = {}, []
    for name in sorted(known.keys() & found.keys(), key=lambda name: (len(known[name]), list(known).index(name))):
        tensor, shape = found[name], tuple(found[name].shape)
        while tensor.ndim > len(known[name]) and len(tensor) == 1:
            tensor = tensor[0]
        expected = [lengths.get(dimension, dimension) for dimension in known[name]]
        if len(expected) == tensor.ndim and all(
            isinstance(length, str) or length == own for length, own in zip(expected, tensor.shape, strict=True)
        ):
            lengths.update(zip(known[name], tensor.shape, strict=True))
        else:
            problems.append(f"{name} has shape {shape}, wanted ({', '.join(map(str, expected))})")
        tensors[name] = tensor
    if problems:
        raise ArtifactCorrupt(f"{where}: {'; '.join(problems)}; get the file again")
    return tensors


def read_log_sparsity(path: Path, d_sae: int) -> Tensor | None:
    """Return log10 of how often each feature fired, (d_sae,), from a safetensors file; None if there is no such file.

    Raises the errors of ``read_tensors`` and ``check_tensors``, ArtifactMismatch for one of another length.
    """
    if not path.is_file():
        return None
    (values,) = check_tensors(path, read_tensors(path), {"sparsity": ("d_sae",)}).values()
    return checked_log_sparsity(path, values, d_sae)


def checked_log_sparsity(path: Path, values: Tensor, d_sae: int) -> Tensor:
    """Return ``values`` if there is one for each feature. Raises ArtifactMismatch otherwise."""
    if tuple(values.shape) != (d_sae,):
        raise ArtifactMismatch(
            f"{path}: holds values of shape {tuple(values.shape)} for {d_sae} features; it is of another transcoder: "
            "take it out of the folder or get the right one"
        )
    return values


def log_threshold(where: Path, threshold: Tensor) -> Tensor:
    """Return log θ, (d_sae,), of a format that applies no ReLU besides.

    Raises ArtifactMismatch for a threshold below zero, which lets negative values fire.
    """
    if bool((threshold < 0).any()):
        n_below = int((threshold < 0).sum())
        raise ArtifactMismatch(
            f"{where}: {n_below} thresholds are below zero, so features would fire with negative activations; "
            "such transcoders cannot be imported"
        )
    return log_threshold_of_relu(threshold)


def log_threshold_of_relu(threshold: Tensor) -> Tensor:
    """Return log max(θ, 0), (d_sae,), of a format that applies ReLU too, where a threshold below zero is ReLU."""
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
