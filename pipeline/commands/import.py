"""``pipeline import``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import import_transcoder
from pipeline.commands import options
from pipeline.import_transcoder import ORIGINS, ImportSettings
from pipeline.options import read_settings, settings_options


class _ListsOrigins(click.Command):
    """Writes the formats as a list of their own, with what to give for each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the formats, then the options."""
        with formatter.section("Formats"):
            formatter.write_dl([(str(name), about) for name, about in ORIGINS.items()])
        super().format_options(ctx, formatter)


@click.command("import", cls=_ListsOrigins)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--from", "origin", required=True, type=click.Choice(list(ORIGINS)), help="Format of SOURCE.")
@click.option("--cache", required=True, type=options.ARTIFACT, help="Cache of the model it was trained on.")
@options.out
@settings_options(ImportSettings)
@options.device
@options.quiet
def command(
    source: Path,
    origin: import_transcoder.Origin,
    cache: Path,
    output: Path,
    config: Path | None,
    device: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Take over a transcoder that another tool made, to be analysed, evaluated and traced like one trained here.

    \b
    pipeline import layer_8.safetensors --from circuit-tracer --cache caches/gpt2-l8 \\
        --out transcoders/imported-l8
    """
    settings = read_settings(ImportSettings, config, given)
    result = import_transcoder.run(settings, source=source, origin=origin, cache=cache, output=output, device=device)
    if not quiet:
        for note in result.notes:
            click.echo(f"note: {note}")
        fvu = "" if result.fvu is None else f", FVU {result.fvu:.4f}"
        click.echo(f"{result.path}: {result.d_sae:,} features of {result.site}, L0 {result.l0:.1f}{fvu}")
