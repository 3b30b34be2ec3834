"""``pipeline export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.formats.settings import FORMATS, ExportSettings, Format
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.storage.generations import CachePath


class _ListsFormats(SectionCommand):
    """Writes the formats as a list of their own: what goes in and what comes out is the first thing to know."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the formats, then the options."""
        with formatter.section("Formats"):
            formatter.write_dl([(str(name), about) for name, about in FORMATS.items()])
        super().format_options(ctx, formatter)


@click.command("export", cls=_ListsFormats)
@click.argument("sources", metavar="TRANSCODER|TABLES...", type=options.ARTIFACT, nargs=-1, required=True)
@click.option("--to", required=True, type=click.Choice(list(FORMATS)), help="Format to write.")
@options.out
@click.option(
    "--cache",
    type=options.ARTIFACT,
    help="Rows to calibrate TopK's thresholds on; what was trained on (saelens); contexts of the tables (delphi).",
)
@options.generation
@settings_options(ExportSettings)
@options.model_moved
@options.as_json
@options.quiet
def command(
    sources: tuple[Path, ...],
    to: Format,
    output: Path,
    cache: CachePath | None,
    config: Path | None,
    model: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write TRANSCODERs, or TABLES of their features, in the format of another tool.

    \b
    pipeline export transcoders/gpt2-l8 --to saelens --cache caches/gpt2-l8 --out exports/gpt2-l8
    pipeline export demo/circuits/transcoders --to circuit-tracer --cache demo/circuits/cache --out exports/smollm2
    pipeline export tables/gpt2-l* --to circuit-tracer-features --out exports/gpt2-features

    A folder that holds transcoders, or tables, stands for all of them.
    """
    settings = read_settings(ExportSettings, config, given)

    from tailrace.pipeline.formats import export

    result = export.run(settings, to=to, sources=sources, output=output, cache=cache, model=model)
    for note in result.costs if quiet else result.notes:  # what an export is worth is no chatter
        click.echo(note, err=as_json)
    if as_json:
        echo_made(result.path)
    elif not quiet:
        click.echo(f"{result.path}: {len(result.files):,} files for {result.to}")
