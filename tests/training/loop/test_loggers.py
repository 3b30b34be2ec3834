"""Metrics go to TensorBoard and W&B beside the file; neither can spoil a run, and no step is logged twice."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, SettingsError
from tailrace.training.loop.build import build_run
from tailrace.training.loop.firing_frequency import EDGES
from tailrace.training.loop.loggers import Logger, Loggers, TensorBoardLogger, WandbLogger, build_loggers
from tailrace.training.loop.run_log import NOTHING, Extent, RunLog
from tailrace.training.loop.session import Session
from tailrace.training.loop.settings import TrainSettings
from tests.support.planted_runs import PlantedRows, statistics_of

SITE = Site("planted", "hook", "hook", 16, 16, "float32")


class Recorder:
    """A logger that remembers, and fails where it is told to."""

    name = "recorder"
    reference_names = False

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.started: tuple[str, int] | None = None
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.histograms: list[tuple[int, str, list[int]]] = []
        self.closed = False
        self._fails_at = fails_at

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        self.started = (run_name, first_step)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise ConnectionError("no route")
        self.scalars.append((step, dict(values)))

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        assert len(edges) == len(counts) + 1
        self.histograms.append((step, name, list(counts)))

    def close(self) -> None:
        self.closed = True


class Missing(Recorder):
    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        raise SettingsError(f"{self.name} is not there")


def open_log(directory: Path, loggers: Sequence[Logger], first_step: int = 0, extent: Extent = NOTHING) -> RunLog:
    return RunLog(
        directory,
        loggers=loggers,
        run_name="run",
        config={"lr": 0.1},
        first_step=first_step,
        first_row=0,
        extent=extent,
    )


def test_loggers_get_each_number_once_by_a_clean_name_and_by_the_original_ones_where_asked(tmp_path: Path) -> None:
    plain, asking = Recorder(), Recorder()
    asking.reference_names = True
    counts = [0] * (len(EDGES) - 1)
    for name, recorder in (("plain", plain), ("asking", asking)):
        (tmp_path / name).mkdir()
        log = open_log(tmp_path / name, [recorder])
        log.write(5, 50, "train", {"loss": 0.5, "losses/mse_loss": 0.25, "losses/l1_loss": 2.0, "fvu": None, "l0": 4})
        scores = {"fvu": 0.75, "dead_fraction": 0.5, "l0_p05": 1}
        log.write(5, 50, "heldout", {**scores, "log10_frequency": {"low": -10, "high": 0, "counts": counts}})
        log.close()
    train, heldout = {"loss": 0.5, "train/l1": 2.0, "train/l0": 4.0}, {"fvu": 0.75, "dead": 0.5, "scores/l0_p05": 1.0}
    assert plain.scalars == [(5, train), (5, heldout)]
    assert asking.scalars == [(5, {**train, "losses/mse_loss": 0.25, "losses/l1_loss": 2.0}), (5, heldout)]
    assert plain.histograms == [(5, "scores/log10_frequency", counts)]
    assert plain.closed


def test_a_logger_that_fails_later_is_warned_of_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Recorder(fails_at=2), Recorder()
    log = open_log(tmp_path, [failing, other])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            log.write(step, step, "train", {"loss": 1.0})
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "recorder failed (no route) and is left out from here on; metrics.jsonl has every number"
    ]
    assert [step for step, _ in failing.scalars] == [1]
    assert [step for step, _ in other.scalars] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_all_loggers_that_cannot_start_are_named_before_anything_is_written(tmp_path: Path) -> None:
    started = Recorder()
    with pytest.raises(SettingsError, match=r"(?s)recorder is not there.*recorder is not there"):
        open_log(tmp_path, [Missing(), started, Missing()])
    assert started.closed
    assert list(tmp_path.iterdir()) == []


def test_no_logger_stays_open_where_the_log_or_another_logger_is_refused(tmp_path: Path) -> None:
    class Refused(Recorder):
        def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
            raise PermissionError("the disk refuses")

    common: dict[str, Any] = {"run_name": "run", "config": {}, "first_step": 3, "first_row": 0}
    changed, beside = Recorder(), Recorder()
    with pytest.raises(ArtifactCorrupt, match="is not what the run had written"):
        RunLog(tmp_path, loggers=[changed], extent=Extent(7), **common)
    assert changed.closed
    with pytest.raises(PermissionError):
        RunLog(tmp_path, loggers=[beside, Refused()], extent=NOTHING, **common)
    assert beside.closed


def test_a_missing_package_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError) as caught:
        Loggers(build_loggers(tensorboard=True, wandb_project="p")).start(tmp_path, "run", {}, 0)
    assert "tailrace[tensorboard]" in str(caught.value)
    assert "tailrace[wandb]" in str(caught.value)


def test_only_the_loggers_asked_for_are_built() -> None:
    assert build_loggers() == []
    assert [one.name for one in build_loggers(tensorboard=True, wandb_project="p")] == ["TensorBoard", "W&B"]


class EventFile:
    """Stands in for torch's SummaryWriter, which needs the tensorboard package."""

    opened: list[EventFile]

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.points: list[tuple[str, float, int]] = []
        self.raw: dict[str, Any] = {}
        self.is_closed = False
        EventFile.opened.append(self)

    def add_text(self, tag: str, text: str, step: int) -> None: ...

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))

    def add_histogram_raw(self, tag: str, **numbers: Any) -> None:
        self.raw = {"tag": tag, **numbers}

    def close(self) -> None:
        self.is_closed = True


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EventFile.opened = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = EventFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoardLogger()
    board.start(tmp_path, "run", {"lr": 1}, 20)
    board.log_scalars(25, {"train/loss": 0.5})
    board.log_histogram(25, "h", [1, 3], [-2.0, -1.0, 0.0])
    board.close()
    (file,) = EventFile.opened
    assert (file.purge_step, file.log_dir) == (21, str(tmp_path / "tensorboard" / "run"))
    assert file.points == [("train/loss", 0.5, 25)]
    # middles -1.5 and -0.5
    assert file.raw["sum"] == pytest.approx(-3.0)
    assert file.raw["sum_squares"] == pytest.approx(2.25 + 3 * 0.25)
    assert (file.raw["num"], file.raw["bucket_limits"], file.raw["global_step"]) == (4, [-1.0, 0.0], 25)
    assert file.is_closed


class Wandb(types.ModuleType):
    """Stands in for the wandb package: remembers what each run was sent, and answers or does not."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=ConnectionError, AuthenticationError=ConnectionAbortedError)
        self.Settings = dict
        self.run: types.SimpleNamespace | None = None
        self.inits: list[dict[str, Any]] = []
        self.sent: list[tuple[str, int, list[str]]] = []
        self.has_key, self.knows_key, self.takes_runs = False, True, True

    def setup(self, settings: dict[str, Any]) -> None:
        assert settings == {"silent": True}

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt, "a question would stop the run"
        assert self.run is None, "it would say no"
        if verify and self.has_key and not self.knows_key:
            raise ConnectionAbortedError("no such key")
        return self.has_key

    def init(self, **arguments: Any) -> types.SimpleNamespace:
        self.inits.append(arguments)
        if arguments["mode"] == "online" and not self.takes_runs:
            raise ConnectionError("no answer")
        run_id = arguments["id"]
        return types.SimpleNamespace(
            id=run_id,
            log=lambda values, step: self.sent.append((run_id, step, list(values))),
            finish=lambda: None,
            offline=arguments["mode"] == "offline",
            dir=f"{arguments['dir']}/wandb/offline-run-1/files",
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_offline_without_a_key_and_says_how_to_send_the_run(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "sweep" / "runs" / "k=8"
    run.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        for has_key in (False, True):
            wandb.has_key = has_key
            WandbLogger().start(run, "k=8", {}, 0)
    assert [(init["mode"], init["group"]) for init in wandb.inits] == [("offline", "sweep"), ("online", "sweep")]
    said = f"W&B is offline (no key found); to send the run later: wandb sync {run}/wandb/offline-run-1"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_wandb_goes_offline_where_the_server_does_not_know_the_key(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.has_key, wandb.knows_key = True, False
    with caplog.at_level(logging.WARNING):
        WandbLogger().start(tmp_path, "run", {}, 0)
    assert [init["mode"] for init in wandb.inits] == ["offline"]
    assert "no such key" in caplog.text
    assert "wandb sync" in caplog.text


def test_wandb_goes_offline_under_another_id_where_the_server_does_not_answer(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.has_key, wandb.takes_runs = True, False
    with caplog.at_level(logging.WARNING):
        WandbLogger().start(tmp_path, "run", {}, 0)
    failed, taken = wandb.inits
    assert (failed["mode"], taken["mode"]) == ("online", "offline")
    assert failed["id"] != taken["id"]
    assert json.loads((tmp_path / "wandb" / "run.json").read_text())["id"] == taken["id"]
    assert "wandb sync" in caplog.text


@pytest.mark.parametrize(("is_offline", "mode"), [(True, "offline"), (False, "online")])
def test_wandb_does_as_the_run_that_the_caller_has_open(
    tmp_path: Path, wandb: Wandb, is_offline: bool, mode: str
) -> None:
    wandb.run = types.SimpleNamespace(offline=is_offline)
    WandbLogger().start(tmp_path, "run", {}, 0)
    assert [init["mode"] for init in wandb.inits] == [mode]


def test_wandb_online_by_choice_is_an_error_where_the_server_does_not_answer(tmp_path: Path, wandb: Wandb) -> None:
    wandb.takes_runs = False
    with pytest.raises(SettingsError, match=r"no answer.*offline"):
        WandbLogger(mode="online").start(tmp_path, "run", {}, 0)


def test_wandb_continues_its_run_and_sends_no_step_twice(tmp_path: Path, wandb: Wandb) -> None:
    first = WandbLogger()
    first.start(tmp_path, "run", {}, 0)
    for step in (10, 20, 30):
        first.log_scalars(step, {"loss": 1.0})
    again = WandbLogger()  # the first was killed; its run goes on from a checkpoint at 15
    again.start(tmp_path, "run", {}, 15)
    for step in (20, 30, 40):
        again.log_scalars(step, {"loss": 1.0})
    assert len({run for run, _, _ in wandb.sent}) == 1
    steps = [step for _, step, _ in wandb.sent]
    # the last step before the kill may have been sent in part only, and W&B merges values of one step
    assert steps == [10, 20, 30, 30, 40]


def test_wandb_begins_a_new_run_where_training_begins_anew(tmp_path: Path, wandb: Wandb) -> None:
    for _ in range(2):
        one = WandbLogger()
        one.start(tmp_path, "run", {}, 0)
        one.log_scalars(10, {"loss": 1.0})
    assert len({run for run, _, _ in wandb.sent}) == 2


@pytest.fixture
def real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package itself, as it starts in a new process, with its files and its netrc below ``tmp_path``."""
    package = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    package.teardown()
    yield
    package.teardown()


def write_and_close(loggers: Sequence[WandbLogger]) -> None:
    for one in loggers:
        one.log_scalars(1, {"train/loss": 1.0})
        one.log_histogram(1, "h", [1, 2], [0.0, 1.0, 2.0])
    for one in loggers:
        one.close()


@pytest.mark.usefixtures("real_wandb")
@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run_for_each_of_several_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loggers = [WandbLogger() for _ in range(2)]
    for name, one in zip("ab", loggers, strict=True):
        (tmp_path / name).mkdir()
        one.start(tmp_path / name, name, {"lr": 0.1}, 0)  # there is no key to be found
    write_and_close(loggers)
    for name in "ab":
        (written,) = tmp_path.glob(f"{name}/wandb/offline-run-*/*.wandb")
        assert json.loads((tmp_path / name / "wandb" / "run.json").read_text())["id"] in written.name
    assert "deprecated" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("real_wandb")
def test_the_real_wandb_writes_an_offline_run_where_nothing_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    one = WandbLogger()
    with caplog.at_level(logging.WARNING):
        one.start(tmp_path, "run", {}, 0)
    write_and_close([one])
    assert "W&B is offline" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_session_gives_its_loggers_what_it_writes(tmp_path: Path) -> None:
    stream = PlantedRows(batch_rows=32)
    sample = stream.next_batch()[SITE.name].inputs
    settings = TrainSettings.read({"architecture": {"kind": "topk", "k": 2}, "d_sae": 8, "log_every": 2})
    run = build_run(
        settings,
        SITE,
        {"in": statistics_of(sample)},
        n_steps=4,
        device=torch.device("cpu"),
        precision="float32",
    )
    recorder = Recorder()
    with Session(tmp_path, run, settings, n_steps=4, heldout=None, loggers=[recorder]) as session:
        session.resume(None)
        callbacks = session.callbacks(stream)
        for step in range(1, 5):
            run.step(stream.next_batch())
            for callback in callbacks:
                if callback.due(step):
                    callback.action(step)
    assert recorder.started == (tmp_path.name, 0)
    assert recorder.closed
    assert [step for step, values in recorder.scalars if "loss" in values] == [2, 4]
    assert [(step, name) for step, name, _ in recorder.histograms] == [(4, "sparsity/log10_frequency")]
