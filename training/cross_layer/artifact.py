"""A published cross-layer transcoder: how it lies on disk, and how to have it back without the cache.

Weights on disk are folded: they take the language model's own activations and give its own outputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tailrace.storage.artifact import MANIFEST, read_json, read_manifest
from tailrace.storage.cache_format import Site
from tailrace.storage.formats import ARTIFACT_FORMATS, CROSS_LAYER_KIND
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import WEIGHTS, read_transcoder_manifest, weights_as_described
from tailrace.training.architectures.transcoder import load_transcoder as load_of_one_layer
from tailrace.training.cross_layer.stack import CrossLayerTranscoder

KIND = CROSS_LAYER_KIND
"""The artifact's kind."""
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]


def read_cross_layer_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest; the errors are those of ``tailrace.storage.artifact.read_manifest``."""
    return read_manifest(path, KIND)


def sites_of(manifest: Mapping[str, Any]) -> list[Site]:
    """Return the sites of a manifest, lowest layer first."""
    return [Site(**site) for site in manifest["sites"]]


def load_cross_layer(path: Path | str, weights: str = WEIGHTS) -> CrossLayerTranscoder:
    """Load a published cross-layer transcoder on the CPU, in evaluation mode; ``weights`` may name a snapshot.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = read_cross_layer_manifest(path)
    sites = sites_of(manifest)
    transcoder = CrossLayerTranscoder(len(sites), sites[0].d_in, sites[0].d_out, manifest["d_sae"])
    with weights_as_described(path / weights):
        transcoder.load_state_dict(load_file(path / weights))
    return transcoder.eval().requires_grad_(False)


def is_cross_layer(path: Path) -> bool:
    """Return whether a published cross-layer transcoder lies at ``path``."""
    manifest = path / MANIFEST
    content = read_json(manifest) if manifest.is_file() else None
    return isinstance(content, dict) and content.get("kind") == KIND


def read_either_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a transcoder of either kind; the errors are those of ``read_manifest``.

    Both say ``model``, ``d_sae`` and ``digest``; one of several layers has ``sites`` in place of ``site``.
    """
    return read_cross_layer_manifest(path) if is_cross_layer(path) else read_transcoder_manifest(path)


def load_transcoder(path: str | os.PathLike[str], weights: str = WEIGHTS) -> Transcoder:
    """Return a published transcoder of one layer or a cross-layer one, on the CPU, in evaluation mode.

    ``encode`` takes MLP inputs (…, d_in) in the model's own units to activations (…, d_sae), ``decode`` these to MLP
    outputs (…, d_out); a cross-layer one has ``encode_layer``. ``weights`` may name a snapshot. Raises ArtifactError.

    ``tailrace.load_transcoder("transcoders/gpt2").encode(mlp_in)``
    """
    path = Path(path).expanduser()
    return load_cross_layer(path, weights) if is_cross_layer(path) else load_of_one_layer(path, weights)
