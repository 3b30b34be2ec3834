"""A sweep trains what separate runs would, from one reading, and survives runs that diverge."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tailrace.pipeline.artifacts.info_stage import describe as describe_artifact
from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.grid import expand, read_grid
from tailrace.pipeline.train.sweep import SweepResult
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ActionableError, ArtifactMismatch, NonFiniteActivation, SettingsError
from tailrace.storage.orders import GatheredOrder
from tailrace.storage.tables import describe, read_schema, read_table
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.loop.settings import TrainSettings
from tests.pipeline.train.test_resume import results
from tests.support.cache_jobs import command
from tests.support.quick import quick
from tests.support.training_caches import publish_cache, random_rows, small_cache

BASE: dict[str, Any] = {
    "architecture": {"kind": "topk", "k": 3},
    "d_sae": 24,
    "steps": 20,
    "batch_rows": 64,
    "lr": 1e-2,
    "log_every": 5,
    "evaluate_every": 7,
}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.read(BASE, changes)


def run_sweep(runs: dict[str, TrainSettings], cache: Path, output: Path, **arguments: Any) -> SweepResult:
    return sweep.run(runs, cache=cache, output=output, compute=Compute(threads=1, quiet=True), **arguments)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("cache") / "cache")


RUNS = {
    "topk": settings(),
    "fast": settings(lr=3e-2, seed=4),
    "relu": settings(architecture={"kind": "relu", "l1": 0.02}),
    "short": settings(steps=9, snapshots=2),
    "batch": settings(architecture={"kind": "batch_topk", "k": 2}, ema=0.9, d_sae=30),
}


@pytest.fixture(scope="module")
def swept(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run_sweep(RUNS, cache, tmp_path_factory.mktemp("swept") / "sweep")


@pytest.mark.parametrize("name", quick(RUNS, *list(RUNS)[:2]))
def test_every_run_is_byte_for_byte_what_it_would_be_alone(
    swept: SweepResult, cache: Path, tmp_path: Path, name: str
) -> None:
    alone = train.run(RUNS[name], cache=cache, output=tmp_path / "alone", compute=Compute(threads=1, quiet=True))
    assert results(swept.path / "runs" / name) == results(alone.path)
    load_transcoder(swept.path / "runs" / name)


def test_the_table_has_a_row_per_run_and_a_meaning_per_column(swept: SweepResult) -> None:
    table = read_table(swept.path / "runs.parquet")
    rows = {row["name"]: row for row in table.to_pylist()}
    assert list(rows) == list(RUNS)
    manifest = json.loads((swept.path / "runs" / "short" / "manifest.json").read_text())
    short = rows["short"]
    assert (short["status"], short["n_steps"], short["n_rows"], short["path"]) == ("finished", 9, 9 * 64, "runs/short")
    assert short["heldout_fvu"] == manifest["metrics"]["heldout"]["fvu"]
    assert short["heldout_l0"] == manifest["metrics"]["heldout"]["l0"]
    assert short["heldout_dead_fraction"] == manifest["metrics"]["heldout"]["dead_fraction"]
    assert short["train_loss"] == manifest["metrics"]["train"]["loss"]
    assert (short["architecture"], short["k"], short["l1"], short["steps"]) == ("topk", 3, None, 9)
    assert (rows["relu"]["architecture"], rows["relu"]["k"], rows["relu"]["l1"]) == ("relu", None, 0.02)
    assert (rows["fast"]["lr"], rows["fast"]["seed"], rows["fast"]["site"]) == (3e-2, 4, "mlp")
    assert "seconds" not in str(table.column_names)
    assert all(column.meaning for column in describe(read_schema(swept.path / "runs.parquet")))


def test_a_sweep_is_asked_in_sql_as_the_view_runs(swept: SweepResult) -> None:
    sql = "SELECT name FROM runs WHERE architecture = 'topk' ORDER BY heldout_fvu"
    scores = {one.name: one.metrics["heldout"]["fvu"] for one in swept.runs if one.name in ("topk", "fast", "short")}
    answer = query.run(sql, tables=swept.path, format="parquet")
    assert isinstance(answer, pa.Table)
    assert answer["name"].to_pylist() == sorted(scores, key=scores.__getitem__)
    with pytest.raises(ActionableError, match="Tables: metrics, runs, timing"):
        query.run("SELECT 1 FROM features", tables=swept.path)


def test_info_of_a_sweep_counts_how_its_runs_ended(cache: Path, tmp_path: Path) -> None:
    swept = run_sweep({"a": settings(steps=2), "bad": diverging(), "b": settings(steps=3)}, cache, tmp_path / "sweep")
    whole = describe_artifact(swept.path)
    assert summarise(swept.path) == {
        "kind": "sweep",
        "model": f"{whole['model']['name']} ({whole['model'].get('dtype', '?')})",
        "cache id": f"{open_cache(cache).cache_id}, generation 0",
        "runs": "2 finished, 1 diverged",
        "table runs": "3 rows",
        "everything else": "--json",
    }
    assert [one["name"] for one in whole["runs"]] == ["a", "bad", "b"]


def test_a_published_sweep_is_sound_and_comes_back_as_it_is(swept: SweepResult, cache: Path) -> None:
    assert verify_artifact(swept.path, "sweep") == []
    assert not list(swept.path.rglob("checkpoints"))
    before = results(swept.path)
    (swept.path / "runs/topk/checkpoints").mkdir()  # as a kill right after publishing leaves it
    assert run_sweep(RUNS, cache, swept.path) == swept
    assert not list(swept.path.rglob("checkpoints"))
    assert results(swept.path) == before
    with pytest.raises(ArtifactMismatch, match=r"runs\.fast\.settings\.lr: there it is 0\.03, asked for 0\.5"):
        run_sweep({**RUNS, "fast": settings(lr=0.5, seed=4)}, cache, swept.path)


def test_stored_rows_are_read_once_however_many_runs_there_are(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by = {}
    load = GatheredOrder.load
    for n_runs in (1, 4):
        n_loads = [0]

        def counted(self: Any, index: int, stored: Any, count: list[int] = n_loads) -> None:
            count[0] += self._split.name == "train"
            load(self, index, stored)

        monkeypatch.setattr(GatheredOrder, "load", counted)
        runs = {f"lr{n}": settings(lr=1e-2 * (n + 1), steps=10) for n in range(n_runs)}  # one epoch
        run_sweep(runs, cache, tmp_path / f"of-{n_runs}")
        read_by[n_runs] = n_loads[0]
    assert read_by[4] == read_by[1] > 0


def test_no_file_stays_open_for_a_run_so_that_thousands_fit_under_a_usual_limit(cache: Path, tmp_path: Path) -> None:
    runs = {f"seed={seed}": settings(steps=2, seed=seed) for seed in range(24)}
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + len(runs) - 4, before[1]))
    try:
        result = run_sweep(runs, cache, tmp_path / "sweep")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [run.status for run in result.runs] == ["finished"] * len(runs)


def test_runs_on_different_sites_share_a_stream(tmp_path: Path) -> None:
    rows = {
        name: {"train": random_rows(n, 320, 4, 3), "heldout": random_rows(9 + n, 64, 4, 3)}
        for n, name in ((1, "a"), (2, "b"))
    }
    cache = publish_cache(tmp_path / "cache", rows)
    runs = expand(read_grid(["site=a,b"], None), lambda point: settings(**point))
    swept = run_sweep(runs, cache, tmp_path / "sweep")
    assert [one.name for one in swept.runs] == ["site=a", "site=b"]
    alone = train.run(runs["site=b"], cache=cache, output=tmp_path / "alone", compute=Compute(threads=1, quiet=True))
    assert results(swept.path / "runs" / "site=b") == results(alone.path)


def test_runs_of_different_lengths_see_prefixes_of_the_same_rows(cache: Path, tmp_path: Path) -> None:
    runs = expand(read_grid(["rows=128,320"], None), lambda point: settings(steps=None, **point))
    swept = run_sweep(runs, cache, tmp_path / "sweep")
    assert [(one.metrics["steps"], one.metrics["rows"]) for one in swept.runs] == [(2, 128), (5, 320)]


def diverging() -> TrainSettings:
    return settings(lr=1e25, normalisation="none", warmup_steps=0, architecture={"kind": "relu", "l1": 0.0})


def test_a_diverging_run_stops_alone_and_keeps_its_last_checkpoints(cache: Path, tmp_path: Path) -> None:
    runs = {"good": settings(), "bad": diverging(), "other": settings(seed=1)}
    swept = run_sweep(runs, cache, tmp_path / "sweep", checkpoint_steps=1)
    status = {one.name: one.status for one in swept.runs}
    assert status == {"good": "finished", "bad": "diverged", "other": "finished"}
    bad = next(one for one in swept.runs if one.name == "bad")
    assert 0 < bad.metrics["steps"] < 20
    kept = sorted((swept.path / "runs" / "bad" / "checkpoints").glob("*.safetensors"))
    assert kept
    assert int(kept[-1].stem) <= bad.metrics["steps"]
    assert not (swept.path / "runs" / "bad" / "manifest.json").exists()
    row = read_table(swept.path / "runs.parquet").to_pylist()[1]
    assert (row["status"], row["heldout_fvu"], row["n_steps"]) == ("diverged", None, bad.metrics["steps"])
    alone = train.run(settings(), cache=cache, output=tmp_path / "alone", compute=Compute(threads=1, quiet=True))
    assert results(swept.path / "runs" / "good") == results(alone.path)


def test_when_all_runs_diverge_nothing_is_published(cache: Path, tmp_path: Path) -> None:
    runs = {"bad": diverging(), "worse": diverging().model_copy(update={"seed": 3})}
    for _ in range(2):  # continued, they are not run again to the same end
        with pytest.raises(NonFiniteActivation, match=r"all 2 runs diverged[^\0]*bad: the loss[^\0]*worse: the loss"):
            run_sweep(runs, cache, tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "manifest.json").exists()
    good = {"good": settings(steps=3), "better": settings(steps=4)}
    assert len(run_sweep(good, cache, tmp_path / "sweep", fresh=True).runs) == 2


def test_a_run_without_a_row_to_learn_from_stops_alone_and_what_is_finished_stays(cache: Path, tmp_path: Path) -> None:
    few = {"batch_rows": 1, "steps": 40}
    runs = {"short": settings(batch_rows=1, steps=2), "strict": settings(**few, max_norm_multiple=1.6)}
    swept = run_sweep({**runs, "long": settings(**few)}, cache, tmp_path / "sweep")
    assert [(one.name, one.status) for one in swept.runs] == [
        ("short", "finished"), ("strict", "diverged"), ("long", "finished"),
    ]  # fmt: skip
    mark = json.loads((swept.path / "runs" / "strict" / "diverged.json").read_text())
    assert "strict: max_norm_multiple leaves none of the 1 rows of step" in mark["reason"]


def test_what_is_refused_after_a_run_has_ended_deletes_nothing(cache: Path, tmp_path: Path) -> None:
    def refuse(step: int, transcoder: Transcoder) -> None:
        if step == 4:  # hooks are called at the end of the short run too
            raise SettingsError("as whatever a step calls may")

    runs = {"short": settings(steps=2), "long": settings()}
    with pytest.raises(SettingsError, match="whatever a step calls"):
        run_sweep(runs, cache, tmp_path / "sweep", hooks=[(4, refuse)])
    assert (tmp_path / "sweep" / "runs" / "short" / "manifest.json").exists()
    assert [one.status for one in run_sweep(runs, cache, tmp_path / "sweep").runs] == ["finished", "finished"]


def test_weights_that_are_not_finite_after_the_last_step_are_not_published(cache: Path, tmp_path: Path) -> None:
    bad = diverging().model_copy(update={"steps": 1, "lr": 1e39})
    with pytest.raises(NonFiniteActivation):
        train.run(bad, cache=cache, output=tmp_path / "alone", compute=Compute(threads=1, quiet=True))
    assert not (tmp_path / "alone" / "manifest.json").exists()


def test_the_grid_is_the_same_whichever_way_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "product.yaml").write_text("k: [16, 32]\nlr: [1e-3, 2e-3]\n")
    (tmp_path / "list.yaml").write_text(
        "".join(f"- {{architecture: {{kind: topk, k: {k}}}, lr: {lr}}}\n" for k in (16, 32) for lr in ("1e-3", "2e-3"))
    )
    points = read_grid(["k=16,32", "lr=1e-3,2e-3"], None)
    assert [tuple(map(str, point.values())) for point in points] == [
        ("16", "1e-3"), ("16", "2e-3"), ("32", "1e-3"), ("32", "2e-3"),
    ]  # fmt: skip
    product = read_grid([], tmp_path / "product.yaml")
    listed = read_grid([], tmp_path / "list.yaml")
    assert [{**point, "k": str(point["k"])} for point in product] == points
    assert [{**point, "architecture": "topk"} for point in product] == listed


# ---- what cannot be swept


def refused(cache: Path, output: Path, *sweeps: str, file: Path | None = None, **base: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        run_sweep(expand(read_grid(sweeps, file), lambda point: settings(**{**base, **point})), cache, output)
    assert not output.exists()
    return str(caught.value)


def test_every_problem_of_sweep_keys_is_named_at_once_with_near_matches(cache: Path, tmp_path: Path) -> None:
    message = refused(
        cache, tmp_path / "s", "lrr=1,2", "batch-rows=1,2", "order_seed=1,2", "k", "seed=1,,2", "lr=1", "lr=2"
    )
    assert message.splitlines()[1:] == [
        "  --sweep k: wanted NAME=VALUE,VALUE, such as lr=1e-3,2e-3",
        "  --sweep seed=1,,2: wanted NAME=VALUE,VALUE, such as lr=1e-3,2e-3",
        "  --sweep lr=2: lr is swept twice; give all its values at once",
        "  lrr: is no setting of `pipeline train`; did you mean lr?",
        "  batch_rows: cannot be swept, because all runs share one stream of batches, which it decides",
        "  order_seed: cannot be swept, because all runs share one stream of batches, which it decides",
    ]


def test_values_that_do_not_fit_the_cache_are_named_for_every_run(cache: Path, tmp_path: Path) -> None:
    message = refused(cache, tmp_path / "s", "d_sae=2,24", "site=mlp,mpl")
    assert "d_sae=2,site=mlp" in message
    assert "3 features per row cannot be chosen from d_sae = 2" in message
    assert "d_sae=24,site=mpl" in message
    assert "d_sae=24,site=mlp:" not in message
    assert "d_sae: Input should be greater than or equal to 1" in refused(cache, tmp_path / "s", "d_sae=0,24")
    assert "two runs are the same" in refused(cache, tmp_path / "s", "lr=1e-3,0.001")


def test_problems_of_every_run_are_told_at_once_and_only_once(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    swept = ["--sweep", "lr=nan,1e-3,0", "--sweep", "k=4,0", "--site", "mlp", "--out", out]
    answer = command(capsys, "train", cache, *swept)
    assert answer.code == 2
    assert answer.err.splitlines() == [
        "error: this sweep cannot be run:",
        "  lr: Input should be a finite number (got 'nan')",
        "  architecture.k: Input should be greater than or equal to 1 (got '0')",
        "  lr: Input should be greater than 0 (got '0')",
    ]
    assert not out.exists()


def test_runs_given_from_python_must_share_their_batches(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"batch_rows: all runs share one stream[^\0]*got \[32, 64\]"):
        run_sweep({"a": settings(), "b": settings(batch_rows=32)}, cache, tmp_path / "s")
    with pytest.raises(SettingsError, match="a sweep of no runs"):
        run_sweep({}, cache, tmp_path / "s")


def test_a_prefix_that_ends_inside_an_epoch_is_what_a_longer_run_saw_first(cache: Path, tmp_path: Path) -> None:
    opened = open_cache(cache).split("train")
    with opened.stream(["mlp/in"], batch_rows=64, seed=0, n_epochs=1) as stream:
        first = np.concatenate([batch.arrays["mlp/in"].copy() for _, batch in zip(range(2), stream, strict=False)])
    with opened.stream(["mlp/in"], batch_rows=64, seed=0, n_epochs=1) as stream:
        longer = np.concatenate([batch.arrays["mlp/in"].copy() for batch in stream])
    assert np.array_equal(first, longer[:128])


def test_a_score_that_is_not_finite_is_a_divergence_too(cache: Path, tmp_path: Path) -> None:
    # finite weights, but so large that the squared error is not
    bad = diverging().model_copy(update={"evaluate_every": 1})
    swept = run_sweep({"good": settings(steps=3), "bad": bad}, cache, tmp_path / "sweep")
    assert [one.status for one in swept.runs] == ["finished", "diverged"]


# ---- the command


def test_the_command_sweeps_and_prints_a_line_per_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("- {architecture: {kind: topk, k: 3}}\n- {architecture: relu, l1: 0.02}\n")
    base = ["--steps", 4, "--d-sae", 24, "--batch-rows", 64, "--threads", 1, "--out", tmp_path / "s"]
    answer = command(capsys, "train", cache, "--sweep-file", grid, "--sweep", "lr=1e-3,1e-2", *base)
    assert answer.code == 0, answer.err
    names = [line.split("  ")[0] for line in answer.out.splitlines()]
    assert names == [
        "architecture=topk,k=3,lr=0.001",
        "architecture=topk,k=3,lr=0.01",
        "architecture=relu,l1=0.02,lr=0.001",
        "architecture=relu,l1=0.02,lr=0.01",
        f"{tmp_path / 's' / 'runs.parquet'}: written",
    ]
    assert all("4 steps, held-out FVU" in line for line in answer.out.splitlines()[:-1])
    assert command(capsys, "verify", tmp_path / "s").out.endswith("verified\n")
    config = tmp_path / "run.yaml"
    config.write_text("architecture: {kind: topk, k: 3}\nlr: 1e-2\n")
    plain = train.run(
        TrainSettings(architecture={"kind": "topk", "k": 3}, d_sae=24, batch_rows=64, steps=4, lr=1e-2),
        cache=cache, output=tmp_path / "plain", compute=Compute(threads=1, quiet=True),
    )  # fmt: skip
    again = command(
        capsys, "train", cache, "--config", config, "--sweep", "seed=0,1", *base[:-1], tmp_path / "configured"
    )
    assert again.code == 0, again.err
    assert results(tmp_path / "configured" / "runs" / "seed=0") == results(plain.path)


def test_the_command_names_bad_sweeps_and_writes_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "s", "--d-sae", 24]
    for arguments, message in (
        (["--sweep", "lrr=1,2"], "lrr: is no setting of `pipeline train`; did you mean lr?"),
        (["--sweep", "batch_rows=1,2"], "batch_rows: cannot be swept"),
        (["--sweep", "d_sae=0,24"], "d_sae: Input should be greater than or equal to 1"),
        (["--sweep", "k=2,25"], "25 features per row cannot be chosen from d_sae = 24"),
        (["--sweep", "site=mlp,layer3"], "there is no site 'layer3'"),
        (["--sweep-file", tmp_path / "absent.yaml"], "there is no such file"),
    ):
        answer = command(capsys, "train", cache, *out, *arguments)
        assert answer.code == 2
        assert message in answer.err
        assert not (tmp_path / "s").exists()
    (tmp_path / "grid.yaml").write_text("lr: 1e-3\n")
    answer = command(capsys, "train", cache, *out, "--sweep-file", tmp_path / "grid.yaml")
    assert "holds neither a mapping of settings to lists of values" in answer.err
