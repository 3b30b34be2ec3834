"""``pipeline analyze``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline import analyze
from pipeline.analyze import AnalyzeSettings
from pipeline.commands import options
from pipeline.options import read_settings, settings_options


@click.command("analyze")
@click.argument("transcoder", type=options.ARTIFACT)
@click.option("--cache", required=True, type=options.ARTIFACT, help="Cache to read.")
@options.out
@settings_options(AnalyzeSettings)
@options.model_moved
@click.option(
    "--downstream",
    type=options.ARTIFACT,
    multiple=True,
    help="Transcoder of a later layer of the same model, to tell connections to its features; may be repeated.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that share the units; with equal --threads (those of each) tables are the same to the bit.",
)
@options.device
@options.threads
@options.quiet
def command(
    transcoder: Path,
    cache: Path,
    output: Path,
    config: Path | None,
    model: str | None,
    downstream: tuple[Path, ...],
    workers: int,
    device: str,
    threads: int | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Make tables of TRANSCODER's features, examples and scores in one pass over a cache.

    \b
    pipeline analyze transcoders/gpt2-l8 --cache caches/gpt2-l8 --out tables/gpt2-l8
    pipeline query "SELECT feature, frequency, top_token FROM features LIMIT 10" \\
        --tables tables/gpt2-l8
    """
    settings = read_settings(AnalyzeSettings, config, given)
    result = analyze.run(
        settings,
        cache=cache,
        transcoder=transcoder,
        output=output,
        device=device,
        threads=threads,
        quiet=quiet,
        model=model,
        downstream=downstream,
        workers=workers,
        announce=(lambda _: None) if quiet else partial(click.echo, err=True),
    )
    if not quiet:
        fvu = "" if result.fvu is None else f", FVU {result.fvu:.4f}"
        click.echo(
            f"{result.path}: {result.n_features:,} features over {result.n_rows:,} rows, L0 {result.l0:.1f}{fvu}, "
            f"{result.n_dead:,} dead"
        )
