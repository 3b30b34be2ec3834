"""Layers a few rows of which dwarf all others are found from a cache's statistics and scored without these rows too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.pipeline.train.layer_set_scores import LayerOutcome, massive_note, read_layers, score_layer, write_layers
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.statistics import MASSIVE_SHARE, SiteStatistics
from tests.support.spliced_models import random_transcoder
from tests.support.training_caches import publish_cache, random_rows

N_TRAIN, N_HELDOUT, N_MASSIVE = 640, 96, 3


def rows(seed: int, n_rows: int, *, massive: bool) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = random_rows(seed, n_rows, 6, 5)
    if massive:
        outputs = outputs.copy()
        outputs[:N_MASSIVE] *= 1000
    return inputs, outputs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sites = {
        name: {
            "train": rows(1, N_TRAIN, massive=name == "layer1"),
            "heldout": rows(2, N_HELDOUT, massive=name == "layer1"),
        }
        for name in ("layer0", "layer1")
    }
    return publish_cache(tmp_path_factory.mktemp("layers") / "cache", sites)


def outcome(cache: Path, layer: int) -> LayerOutcome:
    coder = random_transcoder(6, 5)
    return score_layer(open_cache(cache), f"layer{layer}", layer, coder, None, device=torch.device("cpu"))


def test_norms_are_read_off_the_statistics_to_a_bins_width() -> None:
    statistics = SiteStatistics(2)
    lengths = np.array([1.0, 2.0, 3.0, 4.0, 500.0], np.float32)
    statistics.add(np.stack([lengths, np.zeros(5, np.float32)], axis=1))
    assert statistics.median_norm == pytest.approx(3.0, rel=0.09)
    assert statistics.largest_norm == pytest.approx(500.0, rel=0.09)
    # the longest 1 % of five rows is a twentieth of the longest one: .05 · 250000 of 250030
    assert statistics.energy_share() == pytest.approx(0.05, rel=1e-2)
    assert statistics.massive_note() is None


def test_a_layer_with_massive_activations_is_marked_with_what_was_found(cache: Path) -> None:
    ordinary, massive = outcome(cache, 0), outcome(cache, 1)
    assert not ordinary.is_massive
    assert ordinary.note is None
    assert massive.is_massive
    assert massive.energy_share_out > 0.99
    assert massive.energy_share_in < MASSIVE_SHARE
    assert massive.note is not None
    assert massive.note.startswith(
        "massive activations; outputs: the longest 1 % of rows hold 100% of the energy, up to"
    )
    assert "inputs" not in massive.note


def fvu(cache: Path, layer: int, kept: slice) -> float:
    """Return FVU over some held-out rows, from its definition, in float64."""
    inputs, outputs = (torch.from_numpy(side)[kept] for side in rows(2, N_HELDOUT, massive=layer == 1))
    error = (random_transcoder(6, 5)(inputs).double() - outputs.double()).square().sum()
    return float(error / (outputs.double() - outputs.double().mean(0)).square().sum())


def test_fvu_is_also_taken_over_the_ordinary_rows(cache: Path) -> None:
    ordinary, massive = outcome(cache, 0), outcome(cache, 1)
    everything, but_the_first = slice(None), slice(N_MASSIVE, None)
    assert (ordinary.n_rows, ordinary.n_ordinary) == (N_HELDOUT, N_HELDOUT)
    assert ordinary.fvu == pytest.approx(fvu(cache, 0, everything), rel=1e-4)
    assert ordinary.fvu_ordinary == pytest.approx(ordinary.fvu)
    assert massive.n_ordinary == N_HELDOUT - N_MASSIVE
    assert massive.fvu == pytest.approx(fvu(cache, 1, everything), rel=1e-4)
    assert massive.fvu_ordinary == pytest.approx(fvu(cache, 1, but_the_first), rel=1e-4)


def test_a_diverged_layer_keeps_its_reason(cache: Path, tmp_path: Path) -> None:
    lost = score_layer(open_cache(cache), "layer1", 1, None, {"reason": "loss is nan"}, device=torch.device("cpu"))
    assert (lost.status, lost.fvu, lost.n_rows) == ("diverged", None, 0)
    assert (lost.note or "").endswith("; diverged: loss is nan")
    assert massive_note({}) is None
    write_layers(tmp_path / "layers.parquet", [lost, outcome(cache, 0)])
    assert read_layers(tmp_path / "layers.parquet") == [lost, outcome(cache, 0)]
