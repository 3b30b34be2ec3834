"""Which runs a sweep is made of: the product of lists of values, or a list of runs; and what each run is called."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrace.pipeline.shared.options import current_names, flat_values, setting_fields
from tailrace.storage.artifact import digest
from tailrace.storage.errors import SettingsError
from tailrace.storage.parsing import read_yaml
from tailrace.training.loop.settings import TrainSettings

SHARED = ("batch_rows", "order_seed")
"""Settings that decide the stream, which all runs read together."""
LONGEST_NAME = 120
MOST_RUNS = 10_000
"""Each takes a folder, and room in memory; sweeps of three thousand have been run."""

Point = dict[str, Any]
"""What one run changes, by the name of the setting's flag."""


def read_grid(sweeps: Sequence[str], file: Path | None) -> list[Point]:
    """Return the runs of ``--sweep NAME=VALUE,VALUE`` flags and of a YAML file: a mapping of lists, or a list of runs.

    Flags multiply what the file lists. Raises SettingsError with every problem of names and values.
    """
    problems: list[str] = []
    lists = _read_flags(sweeps, problems)
    points = _points(read_yaml(file, "sweep"), str(file)) if file is not None else [{}]
    twice = sorted({name for point in points for name in point} & lists.keys())
    problems += [f"{name}: is swept by {file} and by --sweep; leave one out" for name in twice]
    several = [*_product(lists, len(points))]
    return _checked([{**point, **chosen} for point in points for chosen in several], problems)


def grid_of(over: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the runs of what ``read_grid`` has in a file. Raises SettingsError with every problem of names."""
    return _checked(_points(over, "over"), [])


def _checked(points: list[Point], problems: list[str]) -> list[Point]:
    names = list(dict.fromkeys(name for point in points for name in point))
    problems += [problem for name in names if (problem := _problem(name)) is not None]
    if problems:
        raise SettingsError("this sweep cannot be run:\n" + "\n".join(f"  {line}" for line in problems))
    return points


def _read_flags(sweeps: Sequence[str], problems: list[str]) -> dict[str, list[Any]]:
    lists: dict[str, list[Any]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        chosen = [value.strip() for value in values.split(",")]
        if not equals or not name or not all(chosen):
            problems.append(f"--sweep {text}: wanted NAME=VALUE,VALUE, such as lr=1e-3,2e-3")
        elif name in lists:
            problems.append(f"--sweep {text}: {name} is swept twice; give all its values at once")
        else:
            lists[name] = chosen
    return current_names([TrainSettings], lists)


def _points(content: Any, where: str) -> list[Point]:
    """Return the runs of a mapping of lists or a list of mappings, by the names of flags."""
    if isinstance(content, dict) and content and all(_is_filled(value) for value in content.values()):
        points = [*_product(current_names([TrainSettings], content))]
    elif isinstance(content, list | tuple) and content and all(isinstance(run, dict) and run for run in content):
        points = [current_names([TrainSettings], run) for run in content]
    else:
        raise SettingsError(
            f"{where}: holds neither a mapping of settings to lists of values (all combinations are run) nor a list of "
            "mappings of settings to values (one for each run)"
        )
    return [flat_values(TrainSettings, {str(name): value for name, value in point.items()}) for point in points]


def _is_filled(values: Any) -> bool:
    return isinstance(values, list | tuple | range) and len(values) > 0


def _product(lists: Mapping[str, Sequence[Any]], times: int = 1) -> Iterator[Point]:
    """Yield every combination. Raises SettingsError if they, so many ``times``, are too many, before there is any."""
    n_runs = times * math.prod(map(len, lists.values()))
    if n_runs > MOST_RUNS:
        raise SettingsError(
            f"this sweep has {n_runs:,} runs, at most {MOST_RUNS:,} can be trained side by side; list fewer values"
        )
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _problem(name: str) -> str | None:
    if name in SHARED:
        return f"{name}: cannot be swept, because all runs share one stream of batches, which it decides"
    known = setting_fields(TrainSettings)
    if name in known:
        return None
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"{name}: is no setting of `pipeline train`" + (f"; did you mean {' or '.join(near)}?" if near else "")


def expand(points: Sequence[Point], read: Callable[[Point], TrainSettings]) -> dict[str, TrainSettings]:
    """Return the settings of every run by its name; ``read`` makes them from what the run changes.

    Raises SettingsError with what is wrong in any run, each problem once, and for runs that are equal.
    """
    runs: dict[str, TrainSettings] = {}
    problems: dict[str, None] = {}
    for point in points:
        try:
            settings = read(point)
        except SettingsError as error:
            problems |= dict.fromkeys(_without_counts(str(error)))
            continue
        name = run_name(settings, list(point))
        if name in runs:
            problems[f"  {name}: two runs are the same; leave one out"] = None
        runs[name] = settings
    if problems:
        raise SettingsError("\n".join(["this sweep cannot be run:", *problems]))
    return runs


def _without_counts(message: str) -> list[str]:
    """Return the lines of a run's problems; how many it has is no number of the sweep's."""
    problems = [line for line in message.splitlines() if line.startswith("  ")]
    return problems or [f"  {line}" for line in message.splitlines()]


def run_name(settings: TrainSettings, names: Sequence[str]) -> str:
    """Return what a run is called after some of its settings: ``k=32,lr=0.001``, fit for a file's name."""
    values = flat_values(TrainSettings, settings.model_dump(mode="json"))
    text = ",".join(f"{name}={values.get(name)}" for name in names)
    safe = re.sub(r"[^\w=,.+\[\]-]", "_", text)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[:LONGEST_NAME]}-{digest(text)[-8:]}"
