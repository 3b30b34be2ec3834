"""Which positions of a context become rows.

The BOS at position 0 is left out unless asked for: models put activations there that are hundreds of times larger
than elsewhere and the same in every context.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt

from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Settings


class RowFilter(Settings):
    """Which token positions are cached."""

    help_sections: ClassVar = {"exclude": "Which rows"}

    exclude: Literal["bos", "special", "none"] = "bos"
    """Tokens left out: the BOS that begins each context, every special token (BOS, separators, …), or none."""
    first_position: NonNegativeInt = 0
    """Positions before this one are left out as well."""

    def row_mask(
        self, context_length: int, special_token_ids: Collection[int] = ()
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function from token ids (contexts, T) to which of them are rows, bool (contexts, T).

        Raises SettingsError if no position is left, or if special tokens are to be left out and none is known.
        """
        start = max(self.first_position, 0 if self.exclude == "none" else 1)
        if start >= context_length:
            raise SettingsError(
                f"first_position={self.first_position} leaves no row in contexts of {context_length} tokens; "
                f"lower it to at most {context_length - 1}"
            )
        if self.exclude == "special" and not special_token_ids:
            raise SettingsError("exclude=special: this model's tokenizer names no special token; use exclude=bos")
        special = np.array(sorted(special_token_ids) if self.exclude == "special" else [], dtype=np.int64)

        def mask(tokens: np.ndarray) -> np.ndarray:
            return (np.arange(tokens.shape[1]) >= start) & ~np.isin(tokens, special)

        return mask
