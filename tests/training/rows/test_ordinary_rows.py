"""Leaving out the rows whose vectors dwarf all others: which they are, and what is then learnt."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train.stage import TrainResult, run
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import NoOrdinaryRows
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.learnt_rows import LearntRows
from tailrace.training.rows.normalisation import Normalisation
from tailrace.training.rows.ordinary_rows import OrdinaryRows
from tailrace.training.rows.row_source import CacheRows, SampledRows
from tests.support.training_caches import publish_cache, random_rows

N_TRAIN, N_HELDOUT = 640, 96
IS_MASSIVE = slice(None, None, 80)
"""Every eightieth row: 8 of training, 2 held out."""
SETTINGS: dict[str, Any] = {
    "architecture": {"kind": "topk", "k": 2},
    "d_sae": 24,
    "steps": 60,
    "batch_rows": 64,
    "lr": 1e-2,
}


def rows(seed: int, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = random_rows(seed, n_rows, 6, 5)
    outputs = outputs.copy()
    outputs[IS_MASSIVE] *= 1000
    return inputs, outputs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": rows(1, N_TRAIN), "heldout": rows(2, N_HELDOUT)}
    return publish_cache(tmp_path_factory.mktemp("massive") / "cache", {"mlp": splits})


def train_on(cache: Path, output: Path, **changes: Any) -> TrainResult:
    return run(TrainSettings.read(SETTINGS, changes), cache=cache, output=output, compute=Compute(quiet=True))


def statistics_of(batch: Batch) -> dict[Side, SiteStatistics]:
    found: dict[Side, SiteStatistics] = {"in": SiteStatistics(6), "out": SiteStatistics(5)}
    found["in"].add(batch.inputs.numpy())
    found["out"].add(batch.outputs.numpy())
    return found


def test_a_row_is_ordinary_if_both_its_sides_are_short_enough() -> None:
    inputs = torch.tensor([[3.0, 4.0], [0.0, 50.1], [30.0, 40.0], [0.0, 0.0]])  # norms 5, 50.1, 50, 0
    outputs = torch.tensor([[1.0], [1.0], [-20.0], [20.1]])
    ordinary = OrdinaryRows(longest_in=50.0, longest_out=20.0)
    assert ordinary.mask(Batch(inputs, outputs)).tolist() == [True, False, True, False]
    as_they_are = Normalisation(torch.zeros(2), 1.0, torch.zeros(1), 1.0)
    kept = LearntRows(["mlp"], as_they_are, {"mlp": ordinary})({"mlp": Batch(inputs, outputs)})
    assert torch.equal(kept.inputs, inputs[[0, 2]])
    assert torch.equal(kept.outputs, outputs[[0, 2]])


def test_limits_are_multiples_of_the_median_norms() -> None:
    batch = Batch(*map(torch.from_numpy, rows(1, N_TRAIN)))
    ordinary = OrdinaryRows.within(10, statistics_of(batch))
    medians = [float(torch.linalg.vector_norm(side, dim=1).median()) for side in batch]
    # Norms are known to a bin of a quarter octave of their squares.
    assert ordinary.longest_in == pytest.approx(10 * medians[0], rel=0.09)
    assert ordinary.longest_out == pytest.approx(10 * medians[1], rel=0.09)
    assert (~ordinary.mask(batch)).nonzero().flatten().tolist() == list(range(N_TRAIN))[IS_MASSIVE]


def test_drawn_rows_keep_their_places_and_statistics_are_those_of_ordinary_rows(cache: Path) -> None:
    opened = open_cache(cache)
    split, site = opened.split("train"), opened.sites["mlp"]
    sides: dict[Side, SiteStatistics] = {"in": split.statistics("mlp", "in"), "out": split.statistics("mlp", "out")}
    ordinary = OrdinaryRows.within(10, sides)
    everything = CacheRows(split, site, seed=0)
    as_they_are = Normalisation(torch.zeros(6), 1.0, torch.zeros(5), 1.0)
    drawn = LearntRows(["mlp"], as_they_are, {"mlp": ordinary}).source([everything])(N_TRAIN, 0)
    inputs, outputs = rows(1, N_TRAIN)
    assert drawn.context is not None
    assert drawn.position is not None
    places = drawn.context * 8 + drawn.position
    assert sorted(places.tolist()) == sorted(set(range(N_TRAIN)) - set(range(N_TRAIN)[IS_MASSIVE]))
    np.testing.assert_array_equal(drawn.batch.outputs.numpy(), outputs[places])
    found = ordinary.statistics("mlp", site.sides, everything)
    # The cache sums in float32 blocks.
    np.testing.assert_allclose(found["out"].mean, outputs[places].astype(np.float64).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["out"].variance, outputs[places].astype(np.float64).var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["in"].mean, inputs[places].astype(np.float64).mean(axis=0), atol=1e-6)


def hand_built_run(batch: Batch, **changes: Any) -> TrainingRun:
    def source(n_rows: int, step: int) -> SampledRows:
        return SampledRows(Batch(batch.inputs[:n_rows], batch.outputs[:n_rows]), None, None)

    return build_run(
        TrainSettings.read(SETTINGS, {"max_norm_multiple": 10, **changes}),
        Site("mlp", "mlp.in", "mlp.out", 6, 5, "float32"),
        statistics_of(batch),
        n_steps=60,
        device=torch.device("cpu"),
        precision="float32",
        row_source=source,
    )


def test_a_step_learns_from_the_ordinary_rows_and_from_nothing_else() -> None:
    batch = Batch(*map(torch.from_numpy, rows(1, N_TRAIN)))
    is_ordinary = torch.ones(N_TRAIN, dtype=torch.bool)
    is_ordinary[IS_MASSIVE] = False
    given, by_hand = hand_built_run(batch), hand_built_run(batch)
    for _ in range(5):
        given.step({"mlp": batch})
        by_hand.step({"mlp": Batch(batch.inputs[is_ordinary], batch.outputs[is_ordinary])})
    assert given.n_rows_done == 5 * (N_TRAIN - 8)
    for name, value in given.transcoder.state_dict().items():
        assert torch.equal(value, by_hand.transcoder.state_dict()[name]), name


def test_a_batch_without_an_ordinary_row_says_what_to_change() -> None:
    batch = Batch(*map(torch.from_numpy, rows(1, N_TRAIN)))
    with pytest.raises(NoOrdinaryRows, match=r"max_norm_multiple leaves none of the 8 rows of step 1 .* raise it"):
        hand_built_run(batch).step({"mlp": Batch(batch.inputs[IS_MASSIVE], batch.outputs[IS_MASSIVE])})


def test_ordinary_rows_are_learnt_where_massive_ones_would_decide_everything(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = train_on(cache, tmp_path / "whole").path
    [warning] = [record.getMessage() for record in caplog.records if "massive" in record.getMessage()]
    assert "mlp has massive activations: the longest 1 % of rows hold" in warning
    assert "max_norm_multiple 10 would leave such rows out" in warning
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = train_on(cache, tmp_path / "ordinary", max_norm_multiple=10)
    assert not [record for record in caplog.records if "massive" in record.getMessage()]
    heldout = result.metrics["heldout"]
    assert (heldout["n_rows"], heldout["n_ordinary"]) == (N_HELDOUT, N_HELDOUT - 2)
    assert heldout["fvu_ordinary"] < 0.5
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["learnt_from"]["longest_out"] < 1000
    assert json.loads((whole / "manifest.json").read_text())["learnt_from"] is None
    # Without the setting the same rows are predicted worse than by their mean: FVU from its definition, in float64.
    from tailrace.training.architectures.transcoder import load_transcoder

    inputs, outputs = (np.delete(side, np.arange(N_HELDOUT)[IS_MASSIVE], axis=0) for side in rows(2, N_HELDOUT))
    spread = ((outputs - outputs.mean(axis=0, dtype=np.float64)) ** 2).sum()
    fvu = {}
    for path in (whole, result.path):
        predicted = load_transcoder(path)(torch.from_numpy(inputs)).detach().numpy().astype(np.float64)
        fvu[path] = float(((predicted - outputs) ** 2).sum() / spread)
    assert fvu[result.path] == pytest.approx(heldout["fvu_ordinary"], rel=1e-4)
    assert fvu[whole] > 2


def test_a_run_interrupted_and_continued_learns_from_the_same_rows(cache: Path, tmp_path: Path) -> None:
    def interrupt(step: int, transcoder: object) -> None:
        if step == 40:
            raise KeyboardInterrupt

    settings = TrainSettings.read(SETTINGS, {"max_norm_multiple": 10})
    with pytest.raises(KeyboardInterrupt):
        run(
            settings,
            cache=cache,
            output=tmp_path / "cut",
            compute=Compute(quiet=True),
            checkpoint_steps=20,
            hooks=[(40, interrupt)],
        )
    whole, cut = (train_on(cache, tmp_path / name, max_norm_multiple=10).path for name in ("whole", "cut"))
    assert (whole / "weights.safetensors").read_bytes() == (cut / "weights.safetensors").read_bytes()
