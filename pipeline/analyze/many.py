"""``pipeline analyze`` for many transcoders: a folder that gets ordinary tables of each, under its name.

A cross-layer transcoder stands for its layers, whose tables are named after their sites, and after the transcoder's
folder and their sites where others are analysed with it.

Tables have the bytes that analysing their transcoder alone gives. Everything is checked before anything is computed,
and the language model is opened once. Transcoders follow one another, each with a pass of its own: of a pass over
100,000 rows of 576 numbers with 4,096 features, reading the rows is 0.3 s of 6, so to read them once for all would save
little and need the memory of all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tailrace.pipeline.analyze.analysis_pass import check_workers
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import (
    AnalyzeResult,
    PlannedTables,
    open_sources,
    plan,
    read_result,
    refuse_unused_model,
    share_weights,
)
from tailrace.pipeline.artifacts.folders import transcoder_paths
from tailrace.pipeline.artifacts.transcoders import (
    PublishedTranscoder,
    TranscoderLayer,
    open_transcoders,
)
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.artifact import MANIFEST, REQUEST
from tailrace.storage.errors import (
    ActionableError,
    ArtifactCorrupt,
    ArtifactMismatch,
    NonFiniteActivation,
    SettingsError,
    raise_together,
)
from tailrace.storage.generations import CachePath
from tailrace.storage.names import folder_problem
from tailrace.training.architectures.manifest import is_cross_layer

logger = logging.getLogger(__name__)


def run(
    settings: AnalyzeSettings,
    *,
    transcoders: Sequence[Path],
    output: Path,
    cache: CachePath | None = None,
    live: FreshText | None = None,
    compute: Compute = Compute(),
    model: str | None = None,
    downstream: Sequence[Path] = (),
    announce: Callable[[str], object] = logger.info,
    finished: Callable[[AnalyzeResult], object] = lambda _: None,
) -> list[AnalyzeResult]:
    """Publish tables of every one of ``transcoders`` at ``output/<its folder's name>``; those that are there stay.

    A folder stands for the transcoders in it. Each layer of a cross-layer transcoder gets tables at
    ``output/<its site's name>``, or ``output/<folder's name>-<site's name>`` beside other transcoders. The other
    arguments are those of ``tailrace.pipeline.analyze.stage.run``; ``announce`` is given the cost of the first only,
    and ``finished`` each result when it is there. A number of a transcoder that is not finite is an error at the end,
    after the others. Raises SettingsError, ArtifactMismatch or another ArtifactError, with every problem of every
    transcoder and before anything is computed, and what ``tailrace.pipeline.analyze.stage.run`` raises.
    """
    opened = open_transcoders(transcoders)
    outputs = _outputs(opened, output)
    check_workers(compute, is_live=live is not None)
    with compute.opened():
        open_source = open_sources(
            settings,
            [one.path for one in opened],
            cache=cache,
            live=live,
            output=output,
            model=model,
            device=compute.device_name,
        )
        if live is None:
            refuse_unused_model(settings, model, downstream)
        planned: list[PlannedTables] = []
        problems: list[ActionableError] = []
        for analysed, own in outputs.items():
            try:
                planned.append(plan(settings, analysed, own, open_source, downstream))
                planned[-1].refuse_other_tables()
            except ActionableError as error:
                problems.append(error)
        raise_together(problems)
        missing = [one for one in planned if not one.is_made]
        weights = share_weights(settings, {f"{one.analysed}: ": one for one in planned})
        results: list[AnalyzeResult] = []
        for one in planned:
            if not one.is_made:
                say = partial(_say_of_first, announce, len(missing)) if one is missing[0] else _say_nothing
                try:
                    one.make(weights, compute, announce=say)
                except NonFiniteActivation as error:
                    problems.append(NonFiniteActivation(f"{one.analysed}: {error}"))
                    continue
            results.append(read_result(one.output))
            finished(results[-1])
        raise_together(problems)
        return results


def stands_for_many(transcoder: Path) -> bool:
    """Return whether a path is a folder of transcoders or a cross-layer one, and so gets tables of each."""
    return transcoder_paths(transcoder) != [transcoder] or is_cross_layer(transcoder)


def _outputs(transcoders: Sequence[PublishedTranscoder], output: Path) -> dict[TranscoderLayer, Path]:
    """Return where the tables of each layer go.

    Raises ArtifactMismatch or SettingsError if two cannot be told apart, ArtifactCorrupt if one is named elsewhere.
    """
    for name in (MANIFEST, REQUEST):
        if (output / name).exists():
            raise ArtifactMismatch(
                f"{output}: holds an artifact already; with several transcoders, --out is a folder that gets tables of "
                "each in a folder of its own, and so of each layer with a cross-layer transcoder. Choose another"
            )
    if not transcoders:
        raise SettingsError("no transcoder given; give the path of at least one, or of a folder that holds some")
    by_name: dict[str, list[TranscoderLayer]] = {}
    for one in transcoders:
        folder = Path(os.path.abspath(one.path)).name
        for layer in one.layers:
            name = folder
            if one.is_cross_layer:
                name = layer.site.name if len(transcoders) == 1 else f"{folder}-{layer.site.name}"
            if (problem := folder_problem(name)) is not None:
                raise ArtifactCorrupt(f"{one.path}: is called {name!r}, which {problem}; no folder of tables can be")
            by_name.setdefault(name, []).append(layer)
    if repeated := {name: layers for name, layers in by_name.items() if len(layers) > 1}:
        lines = "\n".join(
            f"  {output / name}: {', '.join(str(layer.path) for layer in layers)}" for name, layers in repeated.items()
        )
        raise SettingsError(
            "tables are named like the folders of their transcoders, and some of these are the same; analyse them "
            f"in separate runs, each with its own --out:\n{lines}"
        )
    return {layers[0]: output / name for name, layers in by_name.items()}


def _say_of_first(announce: Callable[[str], object], n_missing: int, line: str) -> None:
    others = {1: "", 2: "; and about as much for the other"}
    announce(line + others.get(n_missing, f"; and about as much for each of the {n_missing - 1} others"))


def _say_nothing(_: str) -> None:
    """Leave the costs of all but the first out: they are about the same."""
