"""A published transcoder: how it lies on disk, and how to have it back without the cache it was trained on.

Weights on disk are folded: they take the language model's own activations and give its own outputs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailrace.storage.artifact import make_directory, published_file, sync_directory
from tailrace.storage.errors import ArtifactCorrupt, StorageFull
from tailrace.storage.names import temporary_path
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import WEIGHTS, TranscoderManifest

__all__ = ["Transcoder", "load_transcoder", "save_weights"]


def save_weights(path: Path, transcoder: Transcoder) -> None:
    """Write the weights of a folded transcoder."""
    assert transcoder.b_dec is None, "only a folded transcoder is published"
    write_tensors(path, transcoder.state_dict())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that ``path`` holds its old bytes or all the new ones.

    Raises StorageFull if the disk refuses.
    """
    folder = temporary_path(path)  # safetensors writes to a name of its own, and renames it
    temporary = folder / path.name
    try:
        make_directory(path.parent)
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)  # safetensors lets nobody but the owner read, whatever the umask says
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        folder.rmdir()
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageFull(
            f"{path}: cannot be written ({error}). Training up to the last checkpoint is kept: free some space or fix "
            "the permissions, then run the same command again to continue"
        ) from error


@contextmanager
def weights_as_described(path: Path) -> Iterator[None]:
    """Raise ArtifactCorrupt for whatever goes wrong inside with the weights at ``path``, of a whole artifact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactCorrupt(
            f"{path}: does not hold the weights its manifest describes ({error}); restore the file or train again"
        ) from error


def load_transcoder(path: Path | str, weights: str = WEIGHTS) -> Transcoder:
    """Load a published transcoder on the CPU, in evaluation mode; ``weights`` may name one of its snapshots.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = TranscoderManifest.read(path)
    with weights_as_described(path / weights):
        transcoder = manifest.architecture.build(manifest.site.d_in, manifest.site.d_out, manifest.d_sae)
        transcoder.b_dec, transcoder.tied_bias = None, False
        transcoder.load_state_dict(load_file(published_file(path, manifest, weights, whole=True)))
    return transcoder.eval().requires_grad_(False)


def describe_versions() -> dict[str, str]:
    """Return the versions of what computed the weights."""
    return {"torch": torch.__version__.split("+")[0]}
