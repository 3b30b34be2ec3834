"""What training does to weights: it learns, keeps its constraints, and stops on numbers that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, NonFiniteActivation, SettingsError, StorageFull
from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run_log import Extent, JsonLines, RunLog
from tailrace.training.loop.session import StepCallback, every, snapshot_steps
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.train_all import ScheduledRun, train
from tailrace.training.rows.batches import Batch
from tests.support.planted_runs import SITE, WIDTH, PlantedRows, build, statistics_of
from tests.support.quick import quick

RECOVERING: list[Architecture] = [
    TopK(k=2),
    BatchTopK(k=2),
    JumpReLU(l0=0.05, bandwidth=0.3, initial_threshold=0.03),
    ReLU(l1=0.3),
    Gated(l1=1.0),
    Matryoshka(k=2, levels=2),
]


@pytest.mark.parametrize("architecture", quick(RECOVERING, *RECOVERING[:2]), ids=lambda architecture: architecture.kind)
def test_planted_directions_are_recovered(architecture: Architecture) -> None:
    stream = PlantedRows()
    run = build(stream, architecture, 800, d_sae=64, lr=5e-3)
    train(stream, [ScheduledRun(run, 800)])
    similarities = torch.from_numpy(stream.directions) @ run.transcoder.W_dec.detach().T
    assert float(similarities.max(dim=1).values.mean()) >= 0.9


def test_decoder_rows_have_unit_norm_after_every_step() -> None:
    stream = PlantedRows(batch_rows=32)
    run = build(stream, TopK(k=2), 5, d_sae=8, lr=0.1)

    def check(step: int) -> None:
        norms = torch.linalg.vector_norm(run.transcoder.W_dec.detach(), dim=1)
        assert torch.allclose(norms, torch.ones(8), atol=1e-6), step

    train(stream, [ScheduledRun(run, 5, [StepCallback(every(1), check)])])


def test_several_runs_share_a_stream_and_get_what_each_would_alone() -> None:
    together = PlantedRows(batch_rows=32)
    runs = [build(PlantedRows(batch_rows=32), TopK(k=k), 10, d_sae=8) for k in (1, 2)]
    train(together, [ScheduledRun(run, 10) for run in runs])
    alone = build(PlantedRows(batch_rows=32), TopK(k=2), 10, d_sae=8)
    train(PlantedRows(batch_rows=32), [ScheduledRun(alone, 10)])
    assert torch.equal(runs[1].transcoder.W_enc, alone.transcoder.W_enc)
    assert not torch.equal(runs[0].transcoder.W_enc, alone.transcoder.W_enc)


def test_an_input_far_from_zero_is_learnt_as_well_as_a_centred_one() -> None:
    losses = []
    for offset in (0.0, 10.0):
        stream = PlantedRows(offset=offset)
        run = build(stream, TopK(k=2), 100, d_sae=64, lr=5e-3)
        train(stream, [ScheduledRun(run, 100)])
        assert run.latest is not None
        losses.append(float(run.latest.losses["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_learning_rate_follows_the_schedule_from_its_first_step() -> None:
    run = build(PlantedRows(), TopK(k=2), 100, d_sae=8, lr=0.1, warmup_steps=4, decay_steps=0)
    stream = PlantedRows()
    rates: list[float] = []
    train(stream, [ScheduledRun(run, 5, [StepCallback(every(1), lambda _: rates.append(run.latest_lr))])])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_a_nan_stops_training_before_it_reaches_the_weights() -> None:
    run = build(PlantedRows(), TopK(k=2), 10, d_sae=8)
    before = run.transcoder.W_enc.detach().clone()
    rows = torch.full((4, WIDTH), torch.nan)
    with pytest.raises(NonFiniteActivation, match=r"step 1 .* Checkpoints from before are kept"):  # there is none yet
        run.step({SITE.name: Batch(rows, rows)})
    assert torch.equal(run.transcoder.W_enc, before)


def test_statistics_that_are_not_finite_are_refused_before_training() -> None:
    site = Site("mlp", "a", "b", 2, 2, "float32")
    bad = statistics_of(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    bad.total[0] = np.nan
    good = statistics_of(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(NonFiniteActivation, match="mlp/in"):
        build_run(
            TrainSettings(), site, {"in": bad, "out": good}, n_steps=1, device=torch.device("cpu"), precision="float32"
        )


def test_activations_that_never_vary_are_refused_before_training() -> None:
    site = Site("mlp", "a", "b", 2, 2, "float32")
    constant = statistics_of(torch.full((100, 2), 0.1))
    varying = statistics_of(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(SettingsError, match="mlp/out: all rows are equal"):
        build_run(
            TrainSettings(),
            site,
            {"in": varying, "out": constant},
            n_steps=1,
            device=torch.device("cpu"),
            precision="float32",
        )


def test_bfloat16_products_change_the_result_by_their_rounding_only() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = build_run(
            TrainSettings(architecture=ReLU(), d_sae=32),
            SITE,
            {"in": statistics_of(PlantedRows().next_batch()[SITE.name].inputs)},
            n_steps=1,
            device=torch.device("cpu"),
            precision=precision,
        )
        run.step(PlantedRows().next_batch())
        assert run.latest is not None
        losses[precision] = float(run.latest.losses["loss"])
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2**-6)  # bfloat16 keeps 8 bits


def test_an_explicit_precision_is_taken_as_it_is() -> None:
    assert resolve_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    assert resolve_precision("auto", torch.device("meta")) == "float32"


def test_snapshots_are_evenly_spaced_inside_the_run() -> None:
    assert snapshot_steps(3, 60) == [15, 30, 45]
    assert snapshot_steps(0, 60) == []
    assert snapshot_steps(5, 3) == [1, 2]


def test_a_log_is_cut_back_to_what_its_checkpoint_knew(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    log.write({"step": 1})
    extent = log.commit()
    log.write({"step": 2})
    log = JsonLines(tmp_path / "log", extent)
    log.write({"step": 3})
    again = log.commit()
    assert (tmp_path / "log").read_text() == '{"step": 1}\n{"step": 3}\n'
    assert JsonLines(tmp_path / "log", again).commit() == again


def test_the_name_of_a_log_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, synced = JsonLines(tmp_path / "log"), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    for _ in range(2):
        log.write({"step": 1})
        log.commit()
    file, folder = (tmp_path / "log").stat().st_ino, tmp_path.stat().st_ino
    assert synced == [file, folder, file]


def test_half_a_line_of_a_killed_process_is_cut_off_before_the_next(tmp_path: Path) -> None:
    def log() -> RunLog:
        opened = {"loggers": (), "run_name": "run", "config": {}, "first_step": 0, "first_row": 0, "extent": Extent()}
        return RunLog(tmp_path, **opened)  # type: ignore[arg-type]

    log().write_timing(1, 32, 4)
    timing = tmp_path / "timing.jsonl"
    with timing.open("ab") as file:
        file.write(timing.read_bytes()[:20])
    log().write_timing(2, 64, 4)
    assert [json.loads(line)["step"] for line in timing.read_text().splitlines()] == [1, 2]


def test_a_log_that_is_not_what_its_checkpoint_knew_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = JsonLines(path)
    log.write({"step": 1})
    extent = log.commit()
    for damaged in (b"", b'{"step": 1}', b'{"step": 3}\n{"step": 2}\n'):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactCorrupt, match=r"log: is not what the run had written at its checkpoint \(12 bytes"):
            JsonLines(path, extent)
        assert path.read_bytes() == damaged
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(StorageFull, match="link: cannot be written"):
        JsonLines(tmp_path / "link")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("allowed", [False, True])
def test_tensor_cores_multiply_losses_and_scores_and_nothing_else(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = PlantedRows(batch_rows=8)
    run = build(stream, TopK(k=2), 10, d_sae=32, kernel="dense")
    run.tensor_cores = allowed
    seen: dict[str, str] = {}

    def looking(name: str, function: Any) -> Any:
        def look(*arguments: Any, **given: Any) -> Any:
            seen[name] = torch.get_float32_matmul_precision()
            return function(*arguments, **given)

        return look

    monkeypatch.setattr(run, "_kernel", looking("step", run._kernel))
    monkeypatch.setattr(run.optimiser, "step", looking("update", run.optimiser.step))
    monkeypatch.setattr(run, "predict", looking("score", run.predict))
    run.step(stream.next_batch())
    run.score([stream.next_batch()])
    inside = "high" if allowed else "highest"
    assert seen == {"step": inside, "update": "highest", "score": inside}
    assert torch.get_float32_matmul_precision() == "highest"
