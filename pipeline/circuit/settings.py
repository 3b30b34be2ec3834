"""The settings of ``pipeline circuit``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tailrace.storage.settings import Settings


class CircuitSettings(Settings):
    """How to look for a circuit, and how much of it to keep."""

    help_sections: ClassVar = {
        "iterations": "Search for paths",
        "missing_layers": "What the model computes",
        "max_features": "Attribution graph",
        "dtype": "What the model computes",
    }

    iterations: int = Field(default=3, ge=1)
    """Rounds of the search for paths: steps behind the root."""

    branches: int = Field(default=15, ge=1)
    """Paths kept after each round."""

    order: Literal["signed", "magnitude"] = "signed"
    """signed: paths with the largest contributions; magnitude: also those that inhibit."""

    cap: bool = False
    """Let no step count for more than a feature it acts through; values then no longer add up to a graph."""

    ignore_bos: bool = True
    """Leave out what attention brings from the BOS."""

    extend_layer_0: bool = False
    """Go on from heads of layer 0 to the embeddings that they read, which takes branches to say the same again."""

    filter: tuple[str, ...] = ()
    """Condition that every step must meet, such as token!=9, kind=head or layer<8; give it again for more, which must
    all hold. Fields: kind, layer, token, head, feature, place."""

    missing_layers: Literal["refuse", "opaque"] = "refuse"
    """What to do about layers without a transcoder: opaque makes each such MLP one node that nothing is told about."""

    max_features: int = Field(default=256, ge=0)
    """Features of the attribution graph whose own inputs are computed, always the most influential; 0 for no graph."""

    node_threshold: float = Field(default=0.8, gt=0, le=1)
    """Share of all influence that the attribution graph's nodes keep."""

    edge_threshold: float = Field(default=0.98, gt=0, le=1)
    """Share of what flows between these nodes that the edges keep."""

    dtype: Literal["recorded", "float32"] = "recorded"
    """What the model computes in: as when the transcoders' activations were made, or float32, which adds up more
    closely."""
