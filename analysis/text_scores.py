"""Activations of a transcoder on the tokens of a text, in float32: of chosen features, or of the strongest.

Rows are the positions of a text at the transcoder's input. Rows × d_sae exists only for ``ROWS_AT_ONCE`` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.training.architectures.base import Transcoder

ROWS_AT_ONCE = 1024


class Strongest(NamedTuple):
    """The strongest features on the rows of a text."""

    per_row: list[list[tuple[int, float]]]
    """For each row the features of largest activation with it, the largest first; only those that are active."""
    overall: list[int]
    """The features of largest activation on any row, the largest first."""


def feature_scores(
    coder: Transcoder, inputs: Tensor, features: Sequence[int], *, raw: bool = False
) -> NDArray[np.float32]:
    """Return (rows, n) the activations of ``features`` (n of them, by index) on inputs (rows, d_in).

    ``raw`` gives pre-activations, W_enc x + b_enc, instead.
    """
    chosen = torch.tensor(features, dtype=torch.long, device=coder.W_enc.device)
    with torch.inference_mode():
        if raw:
            parts = [coder.pre_activations_of(chosen, rows) for rows in _pieces(coder, inputs)]
        else:
            parts = [coder.encode(rows).index_select(1, chosen) for rows in _pieces(coder, inputs)]
    # adding 0 removes the sign of zeros, which would be shown
    return torch.cat(parts).float().cpu().numpy() + np.float32(0)


def strongest_features(coder: Transcoder, inputs: Tensor, n: int) -> Strongest:
    """Return the ``n`` strongest features of each row of inputs (rows, d_in), and of all rows together."""
    per_row: list[list[tuple[int, float]]] = []
    largest = torch.zeros(coder.d_sae, device=coder.W_enc.device)
    with torch.inference_mode():
        for rows in _pieces(coder, inputs):
            acts = coder.encode(rows)
            values, index = acts.topk(min(n, coder.d_sae), dim=1)
            per_row += [
                [(feature, value) for feature, value in zip(features, strengths, strict=True) if value > 0]
                for features, strengths in zip(index.tolist(), values.tolist(), strict=True)
            ]
            largest = torch.maximum(largest, acts.amax(dim=0))
        top = largest.topk(min(n, coder.d_sae))
    active = [feature for feature, value in zip(top.indices.tolist(), top.values.tolist(), strict=True) if value > 0]
    return Strongest(per_row, active)


def _pieces(coder: Transcoder, inputs: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        yield inputs[start : start + ROWS_AT_ONCE].to(coder.W_enc.device, torch.float32)
