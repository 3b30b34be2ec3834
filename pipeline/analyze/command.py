"""``pipeline analyze``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.analyze.settings import AnalyzeSettings, read_flat
from tailrace.pipeline.artifacts.folders import transcoder_paths, unfinished_inside
from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import settings_options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.analyze.stage import AnalyzeResult
    from tailrace.storage.generations import CachePath


@click.command("analyze", cls=SectionCommand)
@click.argument("transcoders", metavar="TRANSCODER...", nargs=-1, required=True, type=options.ARTIFACT)
@click.option("--cache", type=options.ARTIFACT, help="Cache to read.")
@options.generation
@click.option("--live", is_flag=True, help="Read no cache: run the language model over --dataset for --rows rows.")
@click.option(
    "--out",
    "output",
    required=True,
    type=options.ARTIFACT,
    help="Tables to write; of a folder of transcoders, or of several: folder in which each gets tables under its name, "
    "and of a cross-layer transcoder each layer.",
)
@settings_options(
    AnalyzeSettings,
    also={"with --live": FreshText},
    notes={
        "split": "With --live: the split of a hub dataset.",
        "seed": "With --live: the order of documents too.",
    },
)
@options.model_moved
@click.option(
    "--downstream",
    type=options.ARTIFACT,
    multiple=True,
    help="Transcoder of later layers of the same model, or a folder of some, to tell connections to its features; may "
    "be repeated.",
)
@options.as_json
@options.computing(options.workers, options.device, options.threads, options.quiet)
def command(
    transcoders: tuple[Path, ...],
    cache: CachePath | None,
    live: bool,
    output: Path,
    config: Path | None,
    model: str | None,
    downstream: tuple[Path, ...],
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Make tables of TRANSCODER's features, examples and scores in one pass over a cache, or over fresh text.

    \b
    pipeline analyze transcoders/gpt2-l8 --cache caches/gpt2-l8 --out tables/gpt2-l8
    pipeline query "SELECT feature, frequency, top_token FROM features LIMIT 10" \\
        --tables tables/gpt2-l8
    pipeline analyze transcoders/gpt2-l8 --live --dataset my-texts/ --rows 200k --out tables/mine

    Of a folder that holds transcoders, such as a sweep or one with a transcoder for every layer, or of several
    transcoders, each gets tables in a folder of its own name below --out. The language model is opened once, and those
    that are finished are not made again:

    \b
    pipeline analyze demo/circuits/transcoders --cache demo/circuits/cache --out tables/smollm2
    pipeline dashboard tables/smollm2/layer3 --out dashboards/layer3

    So does each layer of a cross-layer transcoder, under the name of its site.
    """
    settings, text = read_flat(given, config, is_live=live)

    from tailrace.pipeline.analyze import many as analyze_each
    from tailrace.pipeline.analyze import stage as analyze

    arguments: dict[str, Any] = {
        "cache": cache,
        "live": text,
        "output": output,
        "compute": compute,
        "model": model,
        "downstream": downstream,
        "announce": _say_nothing if compute.quiet else partial(click.echo, err=True),
    }
    say = _say_nothing if compute.quiet or as_json else click.echo
    if len(transcoders) == 1 and not analyze_each.stands_for_many(transcoders[0]):
        result = analyze.run(settings, transcoder=transcoders[0], **arguments)
        say(_line(result))
        if as_json:
            echo_made(result.path, **_scores(result))
        return
    for path in transcoders:
        if unfinished := unfinished_inside(path) if transcoder_paths(path) != [path] else []:
            click.echo(f"{path}: left out, as never finished: {', '.join(one.name for one in unfinished)}", err=True)
    results = analyze_each.run(settings, transcoders=transcoders, finished=lambda one: say(_line(one)), **arguments)
    if as_json:
        options.echo_json({"artifacts": [{"path": str(one.path), **_scores(one)} for one in results]})


def _line(result: AnalyzeResult) -> str:
    fvu = "" if result.fvu is None else f", FVU {result.fvu:.4f}"
    drawn = "" if result.of_rows is None else f" of {result.of_rows:,} (contexts drawn uniformly)"
    return (
        f"{result.path}: {result.n_features:,} features over {result.n_rows:,} rows{drawn}, L0 {result.l0:.1f}{fvu}, "
        f"{result.n_dead:,} dead"
    )


def _scores(result: AnalyzeResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "path"}


def _say_nothing(_: str) -> None:
    """Leave out what --quiet leaves out."""
