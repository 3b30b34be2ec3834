"""Learning rates of every step. The original code's sequences begin one step late; these are its rules, in time."""

from __future__ import annotations

import pytest

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.schedule import Schedule
from tailrace.training.loop.settings import TrainSettings


def factors(schedule: Schedule, n: int) -> list[float]:
    return [schedule.factor(step) for step in range(n)]


def test_constant_schedule_is_one_throughout() -> None:
    assert factors(Schedule(n_steps=3), 3) == [1, 1, 1]


def test_warmup_of_four_steps_reaches_one_in_its_fourth_step() -> None:
    assert factors(Schedule(n_steps=10, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_warmup_then_decay_falls_to_zero_after_the_last_step_and_never_below() -> None:
    schedule = Schedule(n_steps=10, warmup_steps=4, decay_steps=6)
    wanted = [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6, 0, 0]
    assert factors(schedule, 12) == pytest.approx(wanted)


def test_default_warmup_is_a_twentieth_and_default_decay_a_fifth() -> None:
    assert TrainSettings().build_schedule(2000) == Schedule(2000, 100, 400, final=0.1)
    assert TrainSettings().build_schedule(60_000) == Schedule(60_000, 1000, 12_000, final=0.1)


def test_zero_turns_warmup_and_decay_off() -> None:
    assert TrainSettings(warmup_steps=0, decay_steps=0).build_schedule(100) == Schedule(100, 0, 0, final=0.1)


def test_length_is_rounded_up_to_the_step_that_reaches_the_rows() -> None:
    settings = TrainSettings(rows=1000, batch_rows=300)
    assert settings.n_steps(n_rows=100_000, n_steps_per_epoch=333) == 4


def test_length_in_rows_counts_the_rows_of_a_split_smaller_than_a_batch() -> None:
    assert TrainSettings(rows=1000, batch_rows=4096).n_steps(n_rows=100, n_steps_per_epoch=1) == 10


def test_length_is_one_epoch_unless_told_otherwise() -> None:
    assert TrainSettings().n_steps(n_rows=100_000, n_steps_per_epoch=24) == 24
    assert TrainSettings(epochs=2.5).n_steps(n_rows=100_000, n_steps_per_epoch=24) == 60


def test_all_problems_of_the_settings_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings.read({"lr": -1, "d_sae": 0, "batchrows": 5, "architecture": {"kind": "topk", "k": 0}})
    message = str(caught.value)
    assert all(name in message for name in ("4 problems", "lr:", "d_sae:", "batchrows: is no setting", "k:"))


@pytest.mark.parametrize(
    ("values", "clash"),
    [({"steps": 5, "rows": "1M"}, "rows and steps"), ({"d_sae": 8, "expansion": 4}, "expansion and d_sae")],
)
def test_two_settings_for_one_thing_are_refused(values: dict[str, object], clash: str) -> None:
    with pytest.raises(SettingsError, match=clash):
        TrainSettings.read(values)


@pytest.mark.parametrize(
    ("given", "n_steps", "expected"),
    [
        ({}, 146, (4, 14, 1024)),
        ({}, 100_000, (50, 1000, 65_536)),
        ({}, 3, (1, 1, 1024)),
        ({"log_every": 7, "evaluate_every": 30}, 146, (7, 30, 65_536)),
        ({"evaluation_rows": 500}, 146, (4, 14, 500)),
    ],
)
def test_a_run_is_scored_ten_times_and_logged_thirty_times_at_least(
    given: dict[str, int], n_steps: int, expected: tuple[int, int, int]
) -> None:
    assert TrainSettings.read(given).intervals(n_steps) == expected
