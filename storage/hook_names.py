"""Names of hooks as they are recorded: a hook point of the model, or an attention head's slice of it.

``blocks.3.attn.hook_z`` is all of the point and ``blocks.3.attn.hook_z[5]`` its head 5. Nothing here knows a model,
so nothing here checks that it has such a point or head.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ONE_HEAD = re.compile(r"([^\[\]]+?)\s*\[\s*([+-]?[0-9]+)\s*\]")


class HookName(NamedTuple):
    """A hook point by name, and which head of it is meant."""

    point: str
    """Name of the point; a malformed name is kept here, brackets included, and no model has it."""
    head: int | None
    """Index of the head, from 0; None for all of the point. As written, so possibly no valid index: -1."""

    @classmethod
    def parse(cls, name: str) -> HookName:
        """Read ``HOOK`` or ``HOOK[H]``."""
        match = _ONE_HEAD.fullmatch(name)
        return cls(name, None) if match is None else cls(match[1], int(match[2]))

    @property
    def layer(self) -> int | None:
        """The layer whose block the point is in; None outside all blocks."""
        first, _, rest = self.point.partition(".")
        number = rest.partition(".")[0]
        return int(number) if first == "blocks" and number.isdigit() else None

    def __str__(self) -> str:
        return self.point if self.head is None else f"{self.point}[{self.head}]"
