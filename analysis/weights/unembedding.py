"""Tokens that a feature makes likelier or less likely on its direct path to the unembedding.

The effect of feature i on the logits is W_dec[i] carried to the residual stream (``tailrace.analysis.weights.stream``)
and through the linear part of the final norm, times W_U: the final norm's gain counts, as W_U reads behind it, and what
the norm divides by does not, as it depends on the text. So numbers are logits per activation up to a positive factor of
the position, and a model with folded weights gives the same tokens as the raw model. Later layers are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.weights.extremes import Ends, largest, products, smallest
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import Carry, StreamPoint, carry_forth
from tailrace.storage.compiled import compiled_loop
from tailrace.storage.errors import ModelError

N_TOKENS = 10
"""Tokens kept at either end."""
N_BINS = 50
"""Bins of a feature's histogram over all tokens, from its smallest to its largest effect."""


@dataclass(frozen=True)
class TokenEffects:
    """A summary of the effects of every feature on the logits."""

    promoted: Ends
    """(d_sae, n) the tokens it raises most, the most first."""
    suppressed: Ends
    """(d_sae, n) the tokens it lowers most, the most first."""
    histogram: NDArray[np.int32]
    """(d_sae, N_BINS) tokens per bin; all of the vocabulary."""
    histogram_edges: NDArray[np.float32]
    """(d_sae, N_BINS + 1) a bin holds its low edge, and the last bin its high edge too."""


def token_effects(
    decoder: Tensor, writes: StreamPoint, weights: ModelWeights, *, progress: Callable[[int], object] = int
) -> TokenEffects:
    """Return the effects of decoder rows (d_sae, d_out) that are written at ``writes``.

    ``progress`` is called with the rows of each block. Memory: W_U in float32 and a few blocks of 64 MB. Raises
    ModelError if a product is not finite.
    """
    W_U = weights.W_U.to(decoder.device, torch.float32)
    promoted, suppressed, histograms, edges = [], [], [], []
    for scores in products(decoder, W_U, _to_logits(writes, weights)):
        promoted.append(largest(scores, N_TOKENS))
        suppressed.append(smallest(scores, N_TOKENS))
        own_edges = _edges(scores)
        histograms.append(_counted(scores, own_edges))
        edges.append(own_edges)
        progress(len(own_edges))
    return TokenEffects(
        Ends.joined(promoted), Ends.joined(suppressed), np.concatenate(histograms), np.concatenate(edges)
    )


def effects_on(
    tokens: Sequence[int], decoder: Tensor, writes: StreamPoint, weights: ModelWeights
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (d_sae, tokens) the effects of decoder rows on chosen tokens, and each token's rank among all tokens.

    Rank 1 is the token that a feature raises most. The effects, and the memory, are those of ``token_effects``.
    """
    effects, ranks = [], []
    for scores in products(decoder, weights.W_U.to(decoder.device, torch.float32), _to_logits(writes, weights)):
        own = scores[:, list(tokens)]
        above = [(scores > column[:, None]).sum(dim=1) for column in own.T]
        effects.append(own.cpu().numpy())
        ranks.append(torch.stack(above, dim=1).cpu().numpy() + 1)
    return np.concatenate(effects), np.concatenate(ranks)


def _to_logits(writes: StreamPoint, weights: ModelWeights) -> Carry:
    return lambda rows: carry_forth(weights.final_norm, writes.carry(rows))


def _edges(scores: Tensor) -> NDArray[np.float32]:
    low, high = (end.cpu().numpy().astype(np.float64) for end in (scores.amin(dim=1), scores.amax(dim=1)))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        # the loop that counts would write outside its bins
        raise ModelError(
            "a product of decoder and unembedding is not finite: the model's unembedding or final norm, or the "
            "transcoder's decoder, holds NaN or infinity; restore their files"
        )
    edges = np.linspace(low, high, N_BINS + 1, axis=1).astype(np.float32)
    edges[:, 0], edges[:, -1] = low, high
    return edges


def _counted(scores: Tensor, edges: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return (rows, N_BINS) how many of each row of scores (rows, n) lie between its own edges."""
    if scores.is_cuda:  # where they are: all of them together are gigabytes, and one core would count them
        return counted_by_sorting(scores, torch.from_numpy(edges).to(scores.device)).to("cpu", torch.int32).numpy()
    counts = np.zeros((len(edges), N_BINS), np.int32)
    _count_into_bins(scores.numpy(), edges, counts)
    return counts


def counted_by_sorting(scores: Tensor, edges: Tensor) -> Tensor:
    """Return (rows, bins) how many of each row of scores (rows, n) lie between its own edges (rows, bins + 1)."""
    below = torch.searchsorted(scores.sort(dim=1).values, edges[:, 1:-1].contiguous())
    none, all_of_them = below.new_zeros(len(below), 1), below.new_full((len(below), 1), scores.shape[1])
    return torch.diff(below, dim=1, prepend=none, append=all_of_them)


@compiled_loop()
def _count_into_bins(scores: NDArray[np.float32], edges: NDArray[np.float32], counts: NDArray[np.int32]) -> None:
    """Count each row of scores (rows, n) between its own edges; exact by the edges as they are rounded."""
    n_bins = counts.shape[1]
    for row in range(scores.shape[0]):
        low, high = edges[row, 0], edges[row, n_bins]
        per_unit = n_bins / (high - low) if high > low else 0.0
        for value in scores[row]:
            bin_index = min(int((value - low) * per_unit), n_bins - 1)
            while bin_index > 0 and value < edges[row, bin_index]:
                bin_index -= 1
            while bin_index < n_bins - 1 and value >= edges[row, bin_index + 1]:
                bin_index += 1
            counts[row, bin_index] += 1


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
