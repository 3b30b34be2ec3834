"""What a feature does to chosen tokens directly: its decoder row through the unembedding, and nothing in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailrace.analysis.weights.model_weights import ModelWeights


def logit_effects(decoder_rows: Tensor, weights: ModelWeights, tokens: Sequence[int]) -> Tensor:
    """Return (features, tokens) float32: W_dec[i] · W_U of chosen tokens, less the mean over the whole vocabulary.

    ``decoder_rows`` (features, d_model). The final norm's gain is applied, and for a layer norm the mean taken off; its
    scale, which depends on the prompt and is the same for all tokens, is not. A number for every token changes no
    probability, so the mean goes; what is left compares between features and tokens.
    """
    rows = decoder_rows.float()
    if weights.final_norm.kind == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    rows = weights.final_norm.pull_back_gain(rows)
    unembedding = weights.W_U.float().to(rows.device)
    chosen = unembedding[:, torch.tensor(list(tokens), device=rows.device)]
    return rows @ (chosen - unembedding.mean(1, keepdim=True))
