"""Settings by the names of their flags, and what is trained of them: one transcoder or a sweep.

``pipeline train`` and ``tailrace.train`` have their settings read and their stage chosen here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings_together, setting_fields
from tailrace.pipeline.train.grid import Point, expand
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Settings
from tailrace.training.loop.settings import TrainSettings

if TYPE_CHECKING:
    from tailrace.pipeline.train.stage import TrainResult
    from tailrace.pipeline.train.sweep import SweepResult
    from tailrace.storage.generations import CachePath

Given = Mapping[str, Any]
"""Values of settings by the names of their flags; None and () are not given."""


def train_one(
    given: Given, *, cache: CachePath | None, live: bool = False, config: Path | None = None, **arguments: Any
) -> TrainResult:
    """Train one transcoder, of several layers with ``cross_layer``.

    ``arguments`` are the others of ``tailrace.pipeline.train.stage.run``, whose errors these are. Raises SettingsError
    for settings that the rows do not go together with.
    """
    asked = _Asked(given, config, cache, is_live=live)
    own, shared = asked.read({})

    from tailrace.pipeline.train import stage  # with torch, which telling what is wrong with a flag needs not

    return stage.run(own, **shared, **arguments)


def train_sweep(
    points: Sequence[Point],
    given: Given,
    *,
    cache: CachePath | None,
    live: bool = False,
    config: Path | None = None,
    **arguments: Any,
) -> SweepResult:
    """Train a run for each of ``points``, side by side; the other arguments are those of ``train_one``."""
    asked = _Asked(given, config, cache, is_live=live)
    # before anything else is read, so that the problems of all runs are told and not the first run's alone
    runs = expand(points, lambda point: asked.read(point)[0])
    _, shared = asked.read(points[0])

    from tailrace.pipeline.train import sweep

    return sweep.run(runs, **shared, **arguments)


def plan(
    points: Sequence[Point],
    given: Given,
    *,
    cache: CachePath | None,
    output: Path,
    config: Path | None,
    compute: Compute,
    shard_features: bool = False,
) -> str:
    """Return what training would cost, in a line or two; ``points`` are a sweep's, or none."""
    asked = _Asked(given, config, cache, is_live=cache is None)
    runs = expand(points, lambda point: asked.read(point)[0]) if points else {"": asked.read({})[0]}

    from tailrace.pipeline.train import stage

    if cache is not None:
        return stage.plan(list(runs.values()), cache, compute, shard_features=shard_features)

    from tailrace.pipeline.train.live_source import plan_live  # with the language model's libraries

    return plan_live(list(runs.values()), asked.read(points[0] if points else {})[1]["live"], output, compute)


class _Asked:
    """What was given, read as the settings classes that know each name."""

    def __init__(self, given: Given, config: Path | None, cache: CachePath | None, *, is_live: bool) -> None:
        if is_live == (cache is not None):
            raise SettingsError("train on a cache, or live with a model and a dataset: give one of them")
        self._given = {name: value for name, value in given.items() if value is not None and value != ()}
        self._config = config
        # beside a cache, model is no setting: it says where the model lies that the cache was made with
        self._rows = {"cache": cache, "model": None if is_live else self._given.pop("model", None)}
        if not is_live:
            refuse_live_settings(self._given)
        self._classes: list[type[Settings]] = [TrainSettings, ModelScoreSettings, *([LiveSettings] if is_live else [])]

    def read(self, point: Point) -> tuple[TrainSettings, dict[str, Any]]:
        """Return the settings of a run that changes ``point``, and the arguments that the others make."""
        own, scores, *live = read_settings_together(self._classes, self._config, {**self._given, **point})
        assert isinstance(own, TrainSettings)
        return own, {**self._rows, "model_scores": scores, "live": live[0] if live else None}


def refuse_live_settings(given: Collection[str]) -> None:
    """Raise SettingsError for flags that mean something with ``--live`` only."""
    others = setting_fields(TrainSettings).keys() | ModelScoreSettings.model_fields.keys()
    if misplaced := [name for name in LiveSettings.model_fields if name in given and name not in others]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in misplaced)
        raise SettingsError(f"{flags}: only with --live; a cache has decided it already. Leave it out")
