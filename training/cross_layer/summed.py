"""One layer of a published cross-layer transcoder, with all that its features write taken together.

For statistics and weights of features one at a time: what they fire on, and what they add to the residual stream. Only
what is summed is read from disk, one target at a time, so a layer takes no more memory the more layers there are.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tailrace.training.architectures.jumprelu import JumpReLU, JumpReLUTranscoder
from tailrace.training.cross_layer.weights_file import open_weights


@torch.no_grad()
def load_summed_layer(path: Path | str, place: int) -> JumpReLUTranscoder:
    """Return the features that read layer ``place``, counted from the transcoder's lowest, on the CPU.

    ``encode`` is ``CrossLayerTranscoder.encode_layer``. ``W_dec`` (d_sae, d_out) is Σ_m W_dec_{place→m}, the sum of
    what a feature writes to its own and all later layers: what it adds to the residual stream in the end, added up in
    float64. Its rows have any length. ``decode`` is therefore no prediction of any layer's output; ``b_dec_out`` is the
    layer's own. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    with open_weights(path) as file:
        site = file.sites[place]
        layer = JumpReLUTranscoder(site.d_in, site.d_out, file.d_sae, settings=JumpReLU())
        file.fill(layer, place)
        total = torch.zeros(file.d_sae, site.d_out, dtype=torch.float64)
        for target in range(place, len(file.sites)):
            total += file.writes(place, target)
        layer.W_dec.copy_(total)
    return layer.eval().requires_grad_(False)
