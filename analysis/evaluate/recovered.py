"""Shares of the cross entropy that ablation costs, which a transcoder recovers. Loads no torch: summaries show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recovered(ablated: float, spliced: float, original: float) -> float | None:
    """Return (ablated − spliced) / (ablated − original); None unless ablation has the larger cross entropy.

    Where the model is better without what is ablated, there is nothing to recover: the share would be of a gap of the
    wrong sign, above 1 where the splice is worse than both.
    """
    return (ablated - spliced) / (ablated - original) if ablated > original else None


def recorded_share(record: Mapping[str, Any]) -> float | None:
    """Return the share recovered of zero ablation in a recorded score; None where it has no cross entropies.

    The share beside them is not read: older releases recorded those of gaps of the wrong sign too. ``record`` is a
    score of an evaluation, or what was measured during training.
    """
    if "zero" in record:
        return recovered(record["zero"]["ce"], record["spliced"]["ce"], record["ce_original"])
    return recovered(record["ce_zero"], record["ce_spliced"], record["ce_original"]) if "ce_zero" in record else None
