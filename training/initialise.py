"""The weights a run begins with, in normalised units.

Decoder rows are random directions of unit norm. The encoder begins as the decoder's transpose times ``encoder_scale``
where inputs and outputs have one width, so that an autoencoder's feature starts out reading what it writes; for
other widths it is its own set of random directions. Biases that stand for means begin as the means of the cache.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage.randomness import philox
from training.architectures.base import Transcoder


def random_directions(seed: int, purpose: str, n: int, width: int) -> Tensor:
    """Return (n, width) float32 rows of unit norm, uniform on the sphere, decided by (seed, purpose)."""
    rows = np.random.Generator(philox(seed, purpose)).standard_normal((n, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows)


@torch.no_grad()
def initialise(
    transcoder: Transcoder, *, mean_in: Tensor, mean_out: Tensor, encoder_scale: float = 1.0, seed: int = 0
) -> None:
    """Fill the weights of ``transcoder``; the means are those of the normalised inputs and outputs."""
    decoder = random_directions(seed, "initialise/decoder", transcoder.d_sae, transcoder.d_out)
    if transcoder.d_in == transcoder.d_out:
        encoder = decoder
    else:
        encoder = random_directions(seed, "initialise/encoder", transcoder.d_sae, transcoder.d_in)
    transcoder.W_dec.copy_(decoder)
    transcoder.W_enc.copy_(encoder * encoder_scale)
    transcoder.b_enc.zero_()
    transcoder.b_dec_out.copy_(mean_out)
    if transcoder.b_dec is not None:
        transcoder.b_dec.copy_(mean_in)
    transcoder.initialise_own()
