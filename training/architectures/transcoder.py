"""A published transcoder: how it lies on disk, and how to have it back without the cache it was trained on.

Weights on disk are folded: they take the language model's own activations and give its own outputs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailrace.storage.artifact import read_manifest, sync_directory
from tailrace.storage.errors import ArtifactCorrupt, StorageFull
from tailrace.storage.formats import ARTIFACT_FORMATS, FOR_ONE_LAYER_ONLY
from tailrace.training.architectures import AnyArchitecture
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.settings import Architecture

__all__ = ["KIND", "WEIGHTS", "Transcoder", "load_transcoder", "read_transcoder_manifest", "save_weights"]

KIND = "transcoder"
"""The artifact's kind."""
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
WEIGHTS = "weights.safetensors"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SNAPSHOTS = "snapshots"
CHECKPOINTS = "checkpoints"

_ARCHITECTURES: TypeAdapter[Architecture] = TypeAdapter(AnyArchitecture)


def save_weights(path: Path, transcoder: Transcoder) -> None:
    """Write the weights of a folded transcoder."""
    assert transcoder.b_dec is None, "only a folded transcoder is published"
    write_tensors(path, transcoder.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that ``path`` holds its old bytes or all the new ones.

    Raises StorageFull if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask says
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageFull(
            f"{path}: cannot be written ({error}). Training up to the last checkpoint is kept: free some space or fix "
            "the permissions, then run the same command again to continue"
        ) from error


def read_transcoder_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a transcoder; the errors are those of ``tailrace.storage.artifact.read_manifest``."""
    return read_manifest(path, KIND, FOR_ONE_LAYER_ONLY)


@contextmanager
def weights_as_described(path: Path) -> Iterator[None]:
    """Raise ArtifactCorrupt for whatever goes wrong inside with the weights at ``path``, of a whole artifact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValidationError) as error:
        raise ArtifactCorrupt(
            f"{path}: does not hold the weights its manifest describes ({error}); restore the file or train again"
        ) from error


def load_transcoder(path: Path | str, weights: str = WEIGHTS) -> Transcoder:
    """Load a published transcoder on the CPU, in evaluation mode; ``weights`` may name one of its snapshots.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = read_transcoder_manifest(path)
    site = manifest["site"]
    with weights_as_described(path / weights):
        architecture = _ARCHITECTURES.validate_python(manifest["architecture"])
        transcoder = architecture.build(site["d_in"], site["d_out"], manifest["d_sae"])
        transcoder.b_dec = None
        transcoder.load_state_dict(load_file(path / weights))
    return transcoder.eval().requires_grad_(False)


def describe_versions() -> dict[str, str]:
    """Return the versions of what computed the weights."""
    return {"torch": torch.__version__.split("+")[0]}
