"""Which tokens a forward pass computes: whole sequences, or what follows the tokens that a key-value cache holds.

A token's position is its place in its sequence, and no shape inside a pass tells it: generation with a cache runs the
prompt once and then each new token alone, and in a batch padded on the left sequences begin at different columns. So it
is read from what the model is called with, anew for every pass. Nothing is counted from one pass to the next, so a
generation may be broken off and another begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tailrace.storage.errors import ModelError


@dataclass(frozen=True, eq=False)
class PassTokens:
    """The tokens of one pass: columns ``first`` to ``end`` of a batch of sequences, padding on the left included."""

    n_contexts: int
    first: int
    end: int
    attention_mask: Any
    """What the model was given: None, or (contexts, ``end``) with 0 for padding."""
    device: torch.device
    written: dict[Any, Any] = field(default_factory=dict)
    """What substitutes leave in this pass for those of later layers."""

    def after_bos(self) -> Tensor:
        """Return (contexts or 1, positions) bool: False at each sequence's first token and at padding before it.

        Raises ModelError for an attention mask of another kind, which does not tell where sequences begin.
        """
        mask = self.attention_mask
        if mask is None:
            return (torch.arange(self.first, self.end, device=self.device) > 0)[None]
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != self.end:
            found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"in a {type(mask).__name__}"
            raise ModelError(
                f"an attention mask {found} does not tell where each sequence begins, so its BOS is not known; give a "
                f"mask (contexts, {self.end}), 0 for padding, or say `where` to replace"
            )
        return ((mask.to(self.device) != 0).cumsum(1) > 1)[:, self.first :]

    def part(self, where: Tensor, name: str) -> Tensor:
        """Return the columns (contexts, positions) of ``where`` that belong to this pass.

        ``where`` is (contexts, columns) bool, longer than what has been run so far or as long, or one column for all.
        Raises ModelError, beginning with ``name``, for any other.
        """
        shape = (self.n_contexts, self.end - self.first)
        n_columns = where.shape[-1] if where.ndim else 1
        own = (where if n_columns == 1 else where[..., self.first : self.end]).to(self.device)
        if n_columns == 1 or n_columns >= self.end:
            with contextlib.suppress(RuntimeError):
                return own.expand(shape)
        raise ModelError(
            f"{name}: {_found(where, (self.n_contexts, self.end))}; give a mask of the batch that is run, with the new "
            "tokens too where text is generated, or one of a single column for every position"
        )


class Passes:
    """The passes of a model while they are followed; made by ``following_passes``."""

    def __init__(self) -> None:
        self._first = 0
        self._attention_mask: Any = None
        self._written: dict[Any, Any] = {}

    def begin(self, _model: Any, _arguments: Any, named: Mapping[str, Any]) -> None:
        """Note what a pass that begins is given; a forward pre-hook."""
        self._first, self._attention_mask = _tokens_before(named), named.get("attention_mask")
        self._written = {}

    def tokens(self, value: Tensor, axis: int = 1) -> PassTokens:
        """Return the tokens of the pass under way; a hook holds ``value`` (contexts, …), with positions on ``axis``."""
        end = self._first + value.shape[axis]
        return PassTokens(len(value), self._first, end, self._attention_mask, value.device, self._written)


@contextlib.contextmanager
def following_passes(bridge: Any) -> Iterator[Passes]:
    """Follow the forward passes of a TransformerLens ``bridge``, however they are started: by ``generate`` too."""
    passes = Passes()
    handle = bridge.original_model.register_forward_pre_hook(passes.begin, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def check_whole(where: Tensor | None, tokens: Tensor) -> None:
    """Raise ModelError if ``where`` goes on after ``tokens`` (contexts, positions), all that is to be run."""
    if where is not None and where.ndim and where.shape[-1] > max(1, tokens.shape[1]):
        raise ModelError(f"{_found(where, tuple(tokens.shape))}; give a mask of the batch that is run")


def _found(where: Tensor, batch: tuple[int, ...]) -> str:
    return f"where has shape {tuple(where.shape)}, the batch {batch} (contexts, positions)"


def _tokens_before(named: Mapping[str, Any]) -> int:
    """Return how many columns a cache holds of each sequence before the pass that begins."""
    if named.get("cache_position") is not None:
        return int(named["cache_position"][0])
    cache = named.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
