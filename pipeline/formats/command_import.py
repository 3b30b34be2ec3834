"""``pipeline import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.formats.settings import ORIGINS, ImportSettings, Origin
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.formats.import_transcoder import ImportResult
    from tailrace.storage.generations import CachePath


class _ListsOrigins(SectionCommand):
    """Writes the formats as a list of their own, with what to give for each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the formats, then the options."""
        with formatter.section("Formats"):
            formatter.write_dl([(str(name), about) for name, about in ORIGINS.items()])
        super().format_options(ctx, formatter)


@click.command("import", cls=_ListsOrigins)
@click.argument("source", type=options.FILE_OR_ARTIFACT)
@click.option("--from", "origin", required=True, type=click.Choice(list(ORIGINS)), help="Format of SOURCE.")
@click.option("--cache", required=True, type=options.ARTIFACT, help="Cache of the model it was trained on.")
@options.generation
@options.out
@settings_options(ImportSettings)
@options.as_json
@options.compute
def command(
    source: Path,
    origin: Origin,
    cache: CachePath,
    output: Path,
    config: Path | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Take over a transcoder that another tool made, to be analysed, evaluated and traced like one trained here.

    \b
    pipeline import layer_8.safetensors --from circuit-tracer --cache caches/gpt2-l8 \\
        --out transcoders/imported-l8
    pipeline import clt-folder --from circuit-tracer --cache caches/gpt2 --out transcoders/imported-clt
    """
    settings = read_settings(ImportSettings, config, given)

    from tailrace.pipeline.formats import import_transcoder

    result = import_transcoder.run(settings, source=source, origin=origin, cache=cache, output=output, compute=compute)
    if as_json:
        echo_made(output, notes=result.notes)
    elif not compute.quiet:
        for note in result.notes:
            click.echo(f"note: {note}")
        click.echo(f"{output}: {_summary(result)}")


def _summary(result: ImportResult) -> str:
    measured = [f"{fvu:.4f}" for fvu in sorted(fvu for fvu in result.fvu if fvu is not None)]
    fvu = f", FVU {' to '.join(dict.fromkeys((measured[0], measured[-1])))}" if measured else ""
    if len(result.sites) == 1:
        return f"{result.d_sae:,} features of {result.sites[0]}, L0 {result.l0[0]:.1f}{fvu}"
    n_layers = len(result.sites)
    return f"{result.d_sae:,} features in each of {n_layers} layers, L0 {sum(result.l0) / n_layers:.1f} a layer{fvu}"
