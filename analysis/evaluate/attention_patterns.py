"""How far attention patterns move when something replaces the queries or keys that they are made of.

A pattern is what queries and keys are for, so for their sites it tells more than the loss does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tailrace.analysis.evaluate.next_tokens import pattern_divergences
from tailrace.storage.cache_format import Site
from tailrace.storage.hook_names import HookName

_QUERIES_OR_KEYS = re.compile(r"(blocks\.\d+\.attn)\.(?:hook_(?:rot_)?[qk]|[qk]\.hook_out)")


class SitePattern(NamedTuple):
    """The attention pattern that a site's queries or keys decide."""

    hook: str
    """Where it passes, (contexts, heads, destinations, sources)."""
    point: str
    """The site's own hook point, (contexts, positions, heads, d_head)."""
    head: int | None

    @property
    def hooks(self) -> tuple[str, str]:
        """What to observe in a run."""
        return self.hook, self.point

    def divergences(self, original: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Tensor:
        """Return KL(original ‖ changed), float64 (contexts, heads, destinations), of the heads that the site serves.

        Both hold what ``hooks`` saw. That is the site's own head, or the group that shares its keys, or all of them.
        """
        before, after = original[self.hook], changed[self.hook]
        if self.head is not None:
            # Keys of grouped attention have fewer heads than patterns: each serves as many, side by side.
            served = before.shape[1] // original[self.point].shape[2]
            heads = slice(self.head * served, (self.head + 1) * served)
            before, after = before[:, heads], after[:, heads]
        return pattern_divergences(before, after)


def pattern_of(site: Site, points: Mapping[str, Any]) -> SitePattern | None:
    """Return the pattern that ``site`` writes to; None unless its output hook holds queries or keys."""
    hook = HookName.parse(site.hook_out)
    match = _QUERIES_OR_KEYS.fullmatch(hook.point)
    if match is None or f"{match[1]}.hook_pattern" not in points:
        return None
    return SitePattern(f"{match[1]}.hook_pattern", hook.point, hook.head)
