"""``pipeline analyze`` for many transcoders: a folder that gets ordinary tables of each, under its name.

A cross-layer transcoder stands for its layers, whose tables are named after their sites.

Tables have the bytes that analysing their transcoder alone gives. Everything is checked before anything is computed,
and the language model is opened once. Transcoders follow one another, each with a pass of its own: of a pass over
100,000 rows of 576 numbers with 4,096 features, reading the rows is 0.3 s of 6, so to read them once for all would save
little and need the memory of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tailrace.pipeline.analyze.analysis_pass import check_workers
from tailrace.pipeline.analyze.coders import AnalysedCoder, analysed_coders
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import (
    AnalyzeResult,
    PlannedTables,
    open_sources,
    plan,
    read_result,
    refuse_unused_model,
)
from tailrace.pipeline.analyze.weight_tables import SharedWeights, later_problems
from tailrace.pipeline.artifacts.folders import artifacts_inside
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.shared.device import open_device
from tailrace.storage.artifact import MANIFEST, REQUEST
from tailrace.storage.draft import LOCK
from tailrace.storage.errors import (
    ActionableError,
    ArtifactCorrupt,
    ArtifactMismatch,
    NonFiniteActivation,
    SettingsError,
)
from tailrace.storage.names import folder_problem
from tailrace.training.architectures.transcoder import KIND
from tailrace.training.cross_layer.artifact import is_cross_layer

logger = logging.getLogger(__name__)


def run(
    settings: AnalyzeSettings,
    *,
    transcoders: Sequence[Path],
    output: Path,
    cache: Path | None = None,
    live: FreshText | None = None,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    model: str | None = None,
    downstream: Sequence[Path] = (),
    workers: int = 1,
    announce: Callable[[str], object] = logger.info,
    finished: Callable[[AnalyzeResult], object] = lambda _: None,
) -> list[AnalyzeResult]:
    """Publish tables of every one of ``transcoders`` at ``output/<its folder's name>``; those that are there stay.

    A cross-layer transcoder is given alone; each of its layers gets tables at ``output/<its site's name>``. The other
    arguments are those of ``tailrace.pipeline.analyze.stage.run``; ``announce`` hears the size of the first only, and
    ``finished`` is told each result when it is there. A transcoder that gives a number that is not finite is told at
    the end, after the others. Raises SettingsError, ArtifactMismatch or another ArtifactError, with every problem of
    every transcoder and before anything is computed, and what ``tailrace.pipeline.analyze.stage.run`` raises.
    """
    coders = analysed_coders(transcoders)
    outputs = _outputs(coders, output)
    on = open_device(device)
    check_workers(workers, on, is_live=live is not None)
    open_source = open_sources(settings, transcoders, cache=cache, live=live, model=model, device=device)
    if live is None:
        refuse_unused_model(settings, model, downstream)
    planned: list[PlannedTables] = []
    problems: list[ActionableError] = []
    for analysed, own in zip(coders, outputs, strict=True):
        try:
            planned.append(plan(settings, analysed, own, open_source, downstream))
            _refuse_other_tables(planned[-1])
        except ActionableError as error:
            problems.append(error)
    _raise_together(problems)
    missing = [one for one in planned if not one.is_made]
    weights = _share_weights(settings, missing, planned[0].source.open_model, downstream)
    results: list[AnalyzeResult] = []
    for one in planned:
        if not one.is_made:
            say = partial(_say_of_first, announce, len(missing)) if one is missing[0] else _say_nothing
            try:
                one.make(weights, on, workers=workers, threads=threads, quiet=quiet, announce=say)
            except NonFiniteActivation as error:
                problems.append(NonFiniteActivation(f"{one.analysed}: {error}"))
                continue
        results.append(read_result(one.output))
        finished(results[-1])
    _raise_together(problems)
    return results


def stands_for_many(transcoder: Path) -> bool:
    """Return whether a path is a folder of transcoders or a cross-layer one, and so gets tables of each."""
    return bool(artifacts_inside(transcoder, KIND)) or is_cross_layer(transcoder)


def _outputs(coders: Sequence[AnalysedCoder], output: Path) -> list[Path]:
    """Return where the tables of each go.

    Raises ArtifactMismatch or SettingsError if two cannot be told apart, ArtifactCorrupt if one is named elsewhere.
    """
    for name in (MANIFEST, REQUEST):
        if (output / name).exists():
            raise ArtifactMismatch(
                f"{output}: holds an artifact already; with several transcoders, --out is a folder that gets tables of "
                "each in a folder of its own, and so of each layer with a cross-layer transcoder. Choose another"
            )
    if not coders:
        raise SettingsError("no transcoder given; give the path of at least one, or of a folder that holds some")
    for one in coders:
        if (problem := folder_problem(one.name)) is not None:
            raise ArtifactCorrupt(f"{one.path}: is called {one.name!r}, which {problem}; no folder of tables can be")
    by_name: dict[str, list[Path]] = {}
    for one in coders:
        by_name.setdefault(one.name, []).append(one.path)
    if repeated := {name: paths for name, paths in by_name.items() if len(paths) > 1}:
        lines = "\n".join(f"  {output / name}: {', '.join(map(str, paths))}" for name, paths in repeated.items())
        raise SettingsError(
            "tables are named like the folders of their transcoders, and some of these are the same; analyse them "
            f"in separate runs, each with its own --out:\n{lines}"
        )
    return [output / name for name in by_name]


def _refuse_other_tables(one: PlannedTables) -> None:
    """Raise ArtifactMismatch, or ArtifactBusy, if the place is taken; nothing is begun there."""
    if one.output.exists() and any(entry.name != LOCK for entry in one.output.iterdir()):
        with one.draft():
            pass


def _share_weights(
    settings: AnalyzeSettings,
    missing: Sequence[PlannedTables],
    open_model: Callable[[], LanguageModel],
    downstream: Sequence[Path],
) -> SharedWeights:
    """Return the weights for the tables that are missing; raise SettingsError if downstream transcoders read earlier.

    Where a transcoder reads is known from the model alone, which is opened for it.
    """
    if not (missing and downstream) or settings.without_model:
        return SharedWeights(open_model, len(missing))
    weights = SharedWeights(open_model, len(missing) + 1)
    with weights.used() as found:
        problems = [
            f"{one.analysed}: {line}"
            for one in missing
            for line in later_problems(one.downstream, found, one.made_of["site"])
        ]
    if problems:
        raise SettingsError("\n".join(problems))
    return weights


def _say_of_first(announce: Callable[[str], object], n_missing: int, line: str) -> None:
    others = {1: "", 2: "; and about as much for the other"}
    announce(line + others.get(n_missing, f"; and about as much for each of the {n_missing - 1} others"))


def _say_nothing(_: str) -> None:
    """Leave the sizes of all but the first out: they are about the same."""


def _raise_together(problems: Sequence[ActionableError]) -> None:
    """Raise one error with every problem, of their class if they share one."""
    if problems:
        kinds = {type(problem) for problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else ActionableError
        lines = dict.fromkeys(map(str, problems))  # layers of one transcoder have the same model
        raise kind("\n".join(lines)) from problems[0]
