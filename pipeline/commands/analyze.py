"""``pipeline analyze``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline import analyze
from pipeline.analyze import AnalyzeSettings
from pipeline.commands import options
from pipeline.live.token_order import FreshText
from pipeline.options import read_settings, read_settings_together, settings_options
from storage.errors import SettingsError


@click.command("analyze")
@click.argument("transcoder", type=options.ARTIFACT)
@click.option("--cache", type=options.ARTIFACT, help="Cache to read.")
@click.option("--live", is_flag=True, help="Read no cache: run the language model over --dataset for --rows rows.")
@options.out
@settings_options(
    AnalyzeSettings,
    also={"with --live: ": FreshText},
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
    cache: Path | None,
    live: bool,
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
    """Make tables of TRANSCODER's features, examples and scores in one pass over a cache, or over fresh text.

    \b
    pipeline analyze transcoders/gpt2-l8 --cache caches/gpt2-l8 --out tables/gpt2-l8
    pipeline query "SELECT feature, frequency, top_token FROM features LIMIT 10" \\
        --tables tables/gpt2-l8
    pipeline analyze transcoders/gpt2-l8 --live --dataset my-texts/ --rows 200k --out tables/mine
    """
    settings, text = _read(config, given, is_live=live)
    result = analyze.run(
        settings,
        cache=cache,
        live=text,
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


def _read(config: Path | None, given: dict[str, Any], *, is_live: bool) -> tuple[AnalyzeSettings, FreshText | None]:
    """Read the settings, and those of the text; a hub dataset's split is not the cache's."""
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    own = AnalyzeSettings.model_fields
    if not is_live:
        if misplaced := [f"--{name.replace('_', '-')}" for name in given if name not in own]:
            raise SettingsError(
                f"{', '.join(misplaced)}: only with --live; a cache has decided it already. Leave it out"
            )
        return read_settings(AnalyzeSettings, config, given), None
    split = {"split": given.pop("split")} if "split" in given else {}
    settings, text = read_settings_together([AnalyzeSettings, FreshText], config, given)
    assert isinstance(settings, AnalyzeSettings)
    assert isinstance(text, FreshText)
    return settings, FreshText.read(text.model_dump(), split, where="the settings")
