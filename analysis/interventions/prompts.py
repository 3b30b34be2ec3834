"""Prompts of different lengths in one batch, each read at its own last token.

Shorter prompts are padded on the right. Attention looks back only, so no token of a prompt sees the padding and no
attention mask is needed; what must never happen is to read a padded prompt at the end of its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.storage.errors import TextError


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts; made by ``pad_prompts``."""

    tokens: Tensor
    """(prompts, positions) int64, right-padded."""
    lengths: Tensor
    """(prompts,) int64, tokens of each."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Prompts:
        """Return the prompts on a device."""
        return Prompts(self.tokens.to(device), self.lengths.to(device))

    @property
    def last(self) -> Tensor:
        """(prompts,) position of each prompt's last token."""
        return self.lengths - 1

    @property
    def is_token(self) -> Tensor:
        """(prompts, positions) bool: False on padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def at_last(self, values: Tensor) -> Tensor:
        """Return (prompts, …) of values (prompts, positions, …): each prompt's row at its last token."""
        return values[torch.arange(len(values), device=values.device), self.last.to(values.device)]

    def at(self, position: int) -> Tensor:
        """Return (prompts, positions) bool, True at ``position`` of every prompt; negative ones count from its end.

        Raises TextError naming every prompt that has no such position.
        """
        places = torch.full_like(self.lengths, position) if position >= 0 else self.lengths + position
        outside = (places < 0) | (places >= self.lengths)
        if outside.any():
            found = ", ".join(
                f"prompt {index} ({int(self.lengths[index])} tokens)" for index in outside.nonzero()[:, 0].tolist()
            )
            raise TextError(f"position {position} does not exist in {found}; choose one that every prompt has")
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) == places[:, None]

    def batches(self, size: int) -> Iterator[tuple[slice, Prompts]]:
        """Yield (which prompts, these prompts) for every ``size`` of them, without padding that none of them needs."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            lengths = self.lengths[part]
            yield part, Prompts(self.tokens[part, : int(lengths.max())], lengths)


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Prompts:
    """Return prompts, each a list of token ids that begins with the BOS if it is to have one, as one batch.

    Padding repeats a prompt's last token, so no id enters that the model might treat as special. Raises TextError for
    no prompts, or prompts without tokens, naming all of them.
    """
    empty = [str(index) for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty or not prompts:
        which = f"prompts {', '.join(empty)} have no tokens" if empty else "there are no prompts"
        raise TextError(f"{which}; give each at least one token")
    longest = max(len(prompt) for prompt in prompts)
    rows = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    return Prompts(torch.tensor(rows, device=device), torch.tensor(lengths, device=device))
