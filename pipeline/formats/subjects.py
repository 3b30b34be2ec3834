"""The transcoders to be written in another format, by what their manifests say, and how files of an export are written.

Weights are loaded one at a time; a file is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tailrace.pipeline.formats.hooks import LayerHooks, layer_hooks
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import load_transcoder, read_transcoder_manifest


@dataclass(frozen=True)
class Subject:
    """A published transcoder on its way into another format."""

    path: Path
    manifest: dict[str, Any]

    def load(self) -> Transcoder:
        """Return the transcoder; the errors are those of ``load_transcoder``."""
        return load_transcoder(self.path)

    @property
    def kind(self) -> str:
        """The kind of its architecture."""
        return str(self.manifest["architecture"]["kind"])

    @property
    def skips(self) -> bool:
        """Whether it has a path past its features."""
        return bool(self.manifest["architecture"].get("skip", False))

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.manifest["d_sae"])

    @property
    def needs_calibration(self) -> bool:
        """Whether no thresholds give its activations exactly."""
        return self.kind == "topk"

    @property
    def site(self) -> dict[str, Any]:
        """The site as the manifest records it."""
        return dict(self.manifest["site"])

    @property
    def model(self) -> dict[str, Any]:
        """The identity of the language model."""
        return dict(self.manifest["model"] or {})

    @property
    def is_raw(self) -> bool:
        """Whether the language model's weights are as published; what is not recorded counts as raw."""
        return bool(self.model.get("processing", "raw") == "raw")

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reconstructs its own input."""
        return bool(self.site["hook_in"] == self.site["hook_out"])

    @property
    def hooks(self) -> LayerHooks | None:
        """Its hooks within their block; None for any other pair."""
        return layer_hooks(self.site)


class TrainedOn(NamedTuple):
    """What is known of the text and the positions that a transcoder was trained on."""

    context_length: int
    first_position: int
    """Positions before this one were left out."""
    without_special_tokens: bool
    dataset: str | None
    """On a hub; None for files of a machine."""


def trained_on(subject: Subject, cache: ActivationCache | None) -> TrainedOn | None:
    """Return what a live run recorded, or what ``cache`` says if it is the cache that was trained on; else None."""
    inputs = subject.manifest["inputs"]
    if "live" in inputs:
        packing, text = inputs["live"]["packing"], inputs["live"]["text"]
        rows = packing
    elif cache is not None and "imported" not in inputs and inputs.get("cache", {}).get("cache_id") == cache.cache_id:
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


def open_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Read the manifests of transcoders; the errors are theirs. Raises SettingsError if none is given."""
    if not paths:
        raise SettingsError("nothing to export; give the path of at least one transcoder")
    return [Subject(path, read_transcoder_manifest(path)) for path in paths]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in the order given. Raises StorageFull if the disk refuses."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def present(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors there are."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
