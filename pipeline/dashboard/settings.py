"""The settings of ``pipeline dashboard``."""

from __future__ import annotations

from pydantic import Field

from tailrace.pipeline.shared.feature_selection import FeatureSelection
from tailrace.storage.settings import Settings


class DashboardSettings(Settings):
    """Which features to show, and how."""

    feature: FeatureSelection = ()
    """Show only these features, e.g. 89,100-200 (both ends belong to a range); may be repeated. All if not given."""

    window: int = Field(default=24, ge=0, lt=2**31)
    """Tokens shown on each side of an example, as far as the tables have them."""

    blind: bool = False
    """Write pages without numbers instead, each named by an item number in shuffled order; key.json says which feature
    an item is."""

    seed: int = 0
    """Decides the order of the items of a blind site; nothing else."""
