"""One layer of a published cross-layer transcoder, with all that its features write taken together.

For statistics and weights of features one at a time: what they fire on, and what they add to the residual stream. Only
what is summed is read from disk, one target at a time, so a layer takes no more memory the more layers there are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from storage.errors import ArtifactCorrupt
from training.architectures.jumprelu import JumpReLU, JumpReLUTranscoder
from training.cross_layer.artifact import read_cross_layer_manifest, sites_of
from training.cross_layer.stack import DECODER
from training.transcoder import WEIGHTS


@torch.no_grad()
def load_summed_layer(path: Path | str, place: int) -> JumpReLUTranscoder:
    """Return the features that read layer ``place``, counted from the transcoder's lowest, on the CPU.

    ``encode`` is ``CrossLayerTranscoder.encode_layer``. ``W_dec`` (d_sae, d_out) is Σ_m W_dec_{place→m}, the sum of
    what a feature writes to its own and all later layers: what it adds to the residual stream in the end, added up in
    float64. Its rows have any length. ``decode`` is therefore no prediction of any layer's output; ``b_dec_out`` is the
    layer's own. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = read_cross_layer_manifest(path)
    sites, d_sae = sites_of(manifest), int(manifest["d_sae"])
    assert 0 <= place < len(sites), f"{place} is a layer of the transcoder"
    d_out = sites[place].d_out
    layer = JumpReLUTranscoder(sites[place].d_in, d_out, d_sae, settings=JumpReLU())
    own = slice(place * d_sae, (place + 1) * d_sae)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            for name in ("W_enc", "b_enc", "log_threshold"):
                getattr(layer, name).copy_(file.get_slice(name)[own])
            layer.b_dec_out.copy_(file.get_slice("b_dec_out")[place * d_out : (place + 1) * d_out])
            written = file.get_slice(f"{DECODER}{place}")
            total = torch.zeros(d_sae, d_out, dtype=torch.float64)
            for target in range(len(sites) - place):
                total += written[:, target * d_out : (target + 1) * d_out]
            layer.W_dec.copy_(total)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactCorrupt(
            f"{path / WEIGHTS}: does not hold the weights its manifest describes ({error}); "
            "restore the file or train again"
        ) from error
    return layer.eval().requires_grad_(False)
