"""Rows of ``layers.parquet`` without training anything."""

from __future__ import annotations

from tailrace.pipeline.train.layer_set_scores import LayerOutcome


def layer_outcome(layer: int, fvu: float | None, fvu_ordinary: float | None) -> LayerOutcome:
    """Return the scores of a finished layer; layer 1 has massive activations."""
    return LayerOutcome(
        layer=layer, site=f"layer{layer}", path=f"layer{layer}", status="finished", n_rows=96, fvu=fvu, l0=4.0,
        dead_fraction=0.0, fvu_ordinary=fvu_ordinary, n_ordinary=90, energy_share_in=0.1, energy_share_out=0.9,
        median_norm_in=1.0, median_norm_out=1.0, largest_norm_in=2.0, largest_norm_out=900.0, is_massive=layer == 1,
        note="massive activations" if layer == 1 else None,
    )  # fmt: skip
