"""``pipeline promotes``."""

from __future__ import annotations

from pathlib import Path

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("promotes", cls=SectionCommand)
@click.argument("tokens", metavar="TOKEN...", nargs=-1, required=True)
@click.option(
    "--transcoders",
    required=True,
    multiple=True,
    type=options.ARTIFACT,
    help="Transcoder whose features are ranked, or a folder of them; may be repeated.",
)
@click.option(
    "--tables",
    multiple=True,
    type=options.ARTIFACT,
    help="Their tables, or a folder of them, to tell what features are about; may be repeated.",
)
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Features shown for each token.")
@click.option(
    "--out",
    "output",
    type=options.FILE,
    help="File for the effects of every feature: .parquet, .csv or .json.",
)
@options.model_elsewhere
@options.as_json
@options.compute
def command(
    tokens: tuple[str, ...],
    transcoders: tuple[Path, ...],
    tables: tuple[Path, ...],
    top: int,
    output: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
) -> None:
    """Rank features by what they write to the logit of TOKEN, by weights alone; any token can be asked.

    \b
    pipeline promotes " Paris" --transcoders transcoders/gpt2-l8 --tables tables/gpt2-l8
    pipeline promotes " he" " she" --transcoders demo/circuits/transcoders --out effects.parquet

    A token is written with its leading space. An effect is per unit of activation, and up to a positive factor that
    depends on the text; what later layers make of it is left out.
    """
    from tailrace.pipeline.query import promotes
    from tailrace.pipeline.query.stage import check_folder, format_of, write_answer
    from tailrace.pipeline.query.text_table import render_table

    if output is not None:
        check_folder(output)
    effects = promotes.run(tokens, transcoders=transcoders, tables=tables, model=model, compute=compute)
    if as_json:
        strongest = promotes.strongest(effects, top).to_pylist()
        options.echo_json({"effects": strongest, **({"path": output} if output is not None else {})})
    elif not compute.quiet:
        click.echo(render_table(promotes.strongest(effects, top), None), nl=False)
    if output is not None:
        write_answer(output, effects, format_of(output))
        click.echo(f"{output}: written", err=as_json)
