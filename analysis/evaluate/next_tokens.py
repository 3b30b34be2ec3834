"""Losses of next-token predictions, and divergences between two models' predictions, token by token, in nats.

Entry t of a context belongs to the prediction made at position t, of the token at t + 1; the last position has
no known target. Softmax over the vocabulary is taken in float32 (whatever the model's dtype, and good to about
1e-6 nats); results are float64 on the host, to be summed there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 23
"""Numbers of a float32 piece of logits: 32 MB, a few times over."""


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross entropy −log p(token t+1) of every prediction, float64 (contexts, positions − 1).

    ``logits`` is (contexts, positions, vocab), ``tokens`` (contexts, positions).
    """
    targets = tokens[:, 1:].to(logits.device).long()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    for context, positions in _pieces(logits):
        losses[context, positions] = F.cross_entropy(
            logits[context, positions].float(), targets[context, positions], reduction="none"
        )
    return losses.to("cpu", torch.float64)


def next_token_divergences(original: Tensor, changed: Tensor) -> Tensor:
    """Return KL(original ‖ changed) of the next-token distributions, float64 (contexts, positions − 1).

    Both are logits, (contexts, positions, vocab), on any device. Rounding alone never makes it negative.
    """
    shape = original.shape[0], original.shape[1] - 1
    divergences = torch.empty(shape, dtype=torch.float32, device=changed.device)
    for context, positions in _pieces(original):
        p, q = (logits[context, positions].to(changed.device).float().log_softmax(-1) for logits in (original, changed))
        divergences[context, positions] = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return divergences.to("cpu", torch.float64)


def pattern_divergences(original: Tensor, changed: Tensor) -> Tensor:
    """Return KL(original ‖ changed) of attention patterns over their sources, float64 (contexts, heads, positions).

    Both are (contexts, heads, destinations, sources) of probabilities. A source without weight in ``original`` counts
    nothing; a source with weight there and none in ``changed`` counts as if it had the smallest positive float32.
    """
    p, q = original.float(), changed.to(original.device).float()
    smallest = torch.finfo(torch.float32).tiny
    terms = p * (p.clamp_min(smallest).log() - q.clamp_min(smallest).log())
    return terms.sum(-1).clamp_min(0).to("cpu", torch.float64)


def _pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Cut the predictions of a batch, the last position left out, into pieces of bounded memory."""
    n_contexts, n_positions, n_vocab = logits.shape
    step = max(1, _NUMBERS_AT_ONCE // n_vocab)
    for context in range(n_contexts):
        for start in range(0, n_positions - 1, step):
            yield context, slice(start, min(start + step, n_positions - 1))
