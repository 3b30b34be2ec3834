"""``pipeline compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import SectionCommand

_NAMES = {"cosine": "decoder cosine", "phi": "φ of firing"}


@click.command("compare", cls=SectionCommand)
@click.argument("a", metavar="TABLES_A", type=options.ARTIFACT)
@click.argument("b", metavar="TABLES_B", type=options.ARTIFACT)
@click.option(
    "--transcoders",
    "transcoders",
    multiple=True,
    type=options.ARTIFACT,
    help="Transcoders of the tables, or a folder of them, to compare decoder rows; may be repeated.",
)
@click.option(
    "--out", "output", type=options.FILE, help="File for the match of every feature: .parquet, .json or .html."
)
@options.as_json
@options.compute
def command(
    a: Path, b: Path, transcoders: tuple[Path, ...], output: Path | None, as_json: bool, compute: Compute
) -> None:
    """Match the features of two dictionaries: for each of TABLES_A the most similar of TABLES_B, and back.

    \b
    pipeline compare tables/k16 tables/k32 --transcoders transcoders --out matches.parquet
    pipeline dashboard tables/k16 tables/k32 --matches matches.parquet --out dashboards/both

    By the rows on which they fire, if both tables keep activations of the same rows of a cache, and by decoder rows, if
    the transcoders are given. A feature is matched if it is more similar than 99 % of features are to a dictionary that
    has nothing to do with theirs.
    """
    from tailrace.pipeline.compare import stage

    result = stage.run((a, b), transcoders=transcoders, output=output, compute=compute)
    if as_json:
        options.echo_json({**result.summary, **({"path": output} if output is not None else {})})
    elif not compute.quiet:
        for line in _lines(result.summary):
            click.echo(line)
    if output is not None:
        click.echo(f"{output}: written", err=as_json)


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for measure, name in _NAMES.items():
        for side, other in (("a", "b"), ("b", "a")) if measure in summary else ():
            one = summary[measure][side]
            if not one["compared"]:
                lines.append(f"{name}, {side} → {other}: no feature can be compared")
                continue
            chance = "0" if one["chance"] is None else f"{one['chance']:.3f}"
            lines.append(
                f"{name}, {side} → {other}: {one['matched']:.1%} of {one['compared']:,} features matched (above "
                f"{chance}, by chance 1 %), {one['mutual']:.1%} both ways; median {one['median']:.3f}"
            )
    return [*lines, *(f"not compared, {reason}" for reason in summary["left_out"].values())]
