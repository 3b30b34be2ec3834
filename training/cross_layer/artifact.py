"""A published transcoder, of one layer or of several, as the module it was, without the cache it was trained on.

Weights on disk are folded: they take the language model's own activations and give its own outputs.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.manifest import WEIGHTS, CrossLayerManifest, is_cross_layer
from tailrace.training.architectures.transcoder import load_transcoder as load_of_one_layer
from tailrace.training.architectures.transcoder import weights_as_described
from tailrace.training.cross_layer.stack import CrossLayerTranscoder


def load_cross_layer(path: Path | str, weights: str = WEIGHTS) -> CrossLayerTranscoder:
    """Load a published cross-layer transcoder on the CPU, in evaluation mode; ``weights`` may name a snapshot.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = CrossLayerManifest.read(path)
    first = manifest.sites[0]
    transcoder = CrossLayerTranscoder(len(manifest.sites), first.d_in, first.d_out, manifest.d_sae)
    with weights_as_described(path / weights):
        transcoder.load_state_dict(load_file(path / weights))
    return transcoder.eval().requires_grad_(False)


def load_transcoder(path: str | os.PathLike[str], weights: str = WEIGHTS) -> Transcoder:
    """Return a published transcoder of one layer or a cross-layer one, on the CPU, in evaluation mode.

    ``encode`` takes MLP inputs (…, d_in) in the model's own units to activations (…, d_sae), ``decode`` these to MLP
    outputs (…, d_out); a cross-layer one has ``encode_layer``. ``weights`` may name a snapshot. Raises ArtifactError.

    ``tailrace.load_transcoder("transcoders/gpt2").encode(mlp_in)``
    """
    path = Path(path).expanduser()
    return load_cross_layer(path, weights) if is_cross_layer(path) else load_of_one_layer(path, weights)
