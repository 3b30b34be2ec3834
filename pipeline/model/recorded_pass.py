"""A pass of the language model recorded as a CUDA graph: the host asks a GPU for all its kernels at once.

TransformerBridge takes 2 ms of host a layer, whatever the GPU can do. Batches of a cache have one shape, and a pass
ends at the same hook always, so what was asked for once can be asked for again, over other tokens in the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from tailrace.storage.errors import ActionableError

logger = logging.getLogger(__name__)

Pass = Callable[[Tensor], dict[str, Tensor]]
"""From tokens (contexts, positions) to activations by hook."""


class RecordedPass:
    """A pass over batches of one shape. Its activations lie in the same memory every time."""

    def __init__(self, run: Pass, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        self._graph = torch.cuda.CUDAGraph()
        # what other threads ask the GPU for meanwhile, such as copies, is no part of it
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._activations = run(self._tokens)

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the activations for ``tokens``; the host waits for nothing."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._activations


class RepeatedPasses:
    """RepeatedPasses to the same hooks over batches of the same shape: recorded at the second, where that can be done.

    A model that looks at numbers of the device while it runs cannot be recorded. A record that gives other bits than
    the pass itself is not used: rows must not depend on which of the two made them.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Size, tuple[str, ...]] | None = None
        self._recorded: RecordedPass | None = None
        self._was_tried = False

    def __call__(self, run: Pass, hooks: tuple[str, ...], tokens: Tensor) -> dict[str, Tensor]:
        """Return ``run(tokens)``; ``hooks`` are what it stops at."""
        if (tokens.shape, hooks) != self._last:
            self._last, self._recorded, self._was_tried = (tokens.shape, hooks), None, False
            return run(tokens)
        if self._recorded is not None:
            return self._recorded(tokens)
        activations = run(tokens)
        if not self._was_tried:
            self._was_tried, self._recorded = True, _record(run, tokens, activations)
        return activations


def _record(run: Pass, tokens: Tensor, activations: dict[str, Tensor]) -> RecordedPass | None:
    try:
        recorded = RecordedPass(run, tokens)
        repeated = recorded(tokens)
    except (RuntimeError, ActionableError) as error:  # explained, or as CUDA says it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.info("passes of the language model are not recorded as a CUDA graph: %s", reason)
        return None
    if all(torch.equal(repeated[hook], values) for hook, values in activations.items()):
        return recorded
    logger.info("a pass recorded as a CUDA graph gives other bits than the language model, so none is used")
    return None
