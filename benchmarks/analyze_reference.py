"""One feature's scores as the original transcoder code computes them: a full forward pass per batch, for that feature.

Formulated from its description: hook activations of 64 prompts are flattened to rows; all features are encoded with a
ReLU and decoded, a loss against the inputs is computed, and the one feature's activations are kept as float16. Running
the language model, which it does anew for every feature too, is left out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BATCH_ROWS = 64 * 128


class ReferenceScores:
    """Weights in the layout of the original: (d_in, d_sae) and (d_sae, d_out)."""

    def __init__(self, encoder: Tensor, decoder: Tensor, threshold: float) -> None:
        self._W_enc, self._W_dec = encoder.T.contiguous(), decoder
        self._b_enc = torch.full((encoder.shape[0],), -threshold)
        self._b_dec, self._b_dec_out = torch.zeros(encoder.shape[1]), torch.zeros(decoder.shape[1])

    @torch.no_grad()
    def scores(self, inputs: Tensor, feature: int) -> np.ndarray:
        """Return one feature's activations (rows,) on inputs (rows, d_in)."""
        found = []
        for rows in inputs.split(BATCH_ROWS):
            centred = rows - self._b_dec
            acts = torch.relu(centred @ self._W_enc + self._b_enc)
            outputs = acts @ self._W_dec + self._b_dec_out
            ((outputs - rows) ** 2 / (rows**2).sum(-1, keepdim=True).sqrt()).mean() + acts.abs().sum(1).mean()
            found.append(acts[:, feature].numpy().astype(np.float16))
        return np.concatenate(found)
