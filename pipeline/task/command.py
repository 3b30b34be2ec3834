"""``pipeline task``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand
from tailrace.pipeline.task.settings import TaskSettings

if TYPE_CHECKING:
    from tailrace.pipeline.task.stage import TaskResult
    from tailrace.pipeline.task.tables import Curve, Ranked


@click.command("task", cls=SectionCommand)
@click.argument("prompts", type=options.FILE)
@click.option(
    "--transcoders",
    required=True,
    multiple=True,
    type=options.ARTIFACT,
    help="Transcoder to look into, or a folder that holds some. May be repeated; each is put in place alone, a "
    "cross-layer one at all its layers.",
)
@options.out
@settings_options(TaskSettings)
@options.model_elsewhere
@options.as_json
@options.compute
def command(
    prompts: Path,
    transcoders: tuple[Path, ...],
    output: Path,
    config: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Find the features that do a task: PROMPTS is a JSON Lines file of prompts with their answers.

    \b
    {"prompt": "The war lasted from 1735 to 17", "correct": ["4", "5"], "incorrect": ["0", "1"]}

    Features are ranked by their variance over the prompts, then kept a few at a time, beside the MLP's neurons, and
    left out one by one. The score is the probability of correct less that of incorrect answers.
    """
    settings = read_settings(TaskSettings, config, given)

    from tailrace.pipeline.task import stage as task

    result = task.run(
        settings,
        prompts=prompts,
        transcoders=transcoders,
        output=output,
        model=model,
        compute=compute,
    )
    if as_json:
        echo_made(result.path)
    elif not compute.quiet:
        for line in show(result):
            click.echo(line)
        click.echo(f"\n{result.path}: written")


def show(result: TaskResult, n_features: int = 8) -> Iterator[str]:
    """Yield the scores with few features and neurons, and the features that vary most."""
    from tailrace.pipeline.task.tables import FEATURES, MODEL, NEURONS, TRANSCODER

    (model,) = [one for one in result.curves if one.kind == MODEL]
    yield f"score of the model itself: {model.score:.4f}, mean of {len(model.scores)} prompts"
    ranked: list[list[Ranked]] = []  # by transcoder, in the order of the curves
    for row in (row for row in result.ranking if row.kind == FEATURES):
        ranked += [[]] if row.rank == 0 else []
        ranked[-1].append(row)
    for number, site in enumerate(dict.fromkeys(one.site for one in result.curves if one.site is not None)):
        own = [one for one in result.curves if one.site == site]
        (whole,) = [one for one in own if one.kind == TRANSCODER]
        yield f"\n{site}, whole transcoder: {whole.score:.4f}"
        yield f"{'kept':>6} {'features':>9} {'neurons':>9}"
        for count in dict.fromkeys(one.n_kept for one in own if one.n_kept is not None):
            yield f"{count:>6} {_score(own, FEATURES, count):>9} {_score(own, NEURONS, count):>9}"
        features = ranked[number][:n_features] if ranked else []
        names = [str(one.index) if one.site == site else f"{one.site}:{one.index}" for one in features]
        width = max([9, *map(len, names)])
        yield f"{'feature':>{width}} {'variance':>9} {'mean':>8} {'active':>7} {'without it':>11}"
        for name, one in zip(names, features, strict=True):
            yield _feature(name.rjust(width), one)


def _score(curves: list[Curve], kind: str, count: int) -> str:
    found = [one.score for one in curves if one.kind == kind and one.n_kept == count]
    return f"{found[0]:.4f}" if found else "–"


def _feature(name: str, one: Ranked) -> str:
    without = "–" if one.score_without is None else f"{one.score_without:.4f}"
    return f"{name} {one.variance:>9.3g} {one.mean:>8.3g} {one.n_active:>7} {without:>11}"
