"""``pipeline pareto``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click

from tailrace.pipeline.evaluate.settings import Measure
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("pareto", cls=SectionCommand)
@click.argument("artifacts", metavar="SWEEP_OR_TRANSCODER...", type=options.ARTIFACT, nargs=-1, required=True)
@click.option("--out", "output", type=options.FILE, help="Picture to write: .png, .svg or .html.")
@click.option("--y", "measure", type=click.Choice(get_args(Measure)), default="fvu", show_default=True)
@options.as_json
def command(artifacts: tuple[Path, ...], output: Path | None, measure: Measure, as_json: bool) -> None:
    """Compare transcoders: L0 against held-out FVU, or against the cross entropy recovered.

    \b
    pipeline pareto sweeps/gpt2-l8 --out gpt2-l8.html
    pipeline pareto sweeps/gpt2-l8 evaluations/gpt2-l8 --y ce_recovered --out gpt2-l8.png

    A line for each architecture joins its best transcoders. CE recovered is read from evaluations given beside the
    transcoders, or from scores taken while training.
    """
    from tailrace.pipeline.evaluate import pareto, pareto_plot

    if output is not None:
        pareto_plot.check_output(output)
    points = pareto.collect(artifacts)
    groups = pareto.lines(points, measure)
    if output is not None:
        pareto_plot.write_plot(output, groups, measure)
    if as_json:
        click.echo(json.dumps(pareto.as_json(points, measure), indent=2))
        return
    for line in align(pareto_plot.table(groups, measure)):
        click.echo(line)
    unmeasured = len(points) - sum(map(len, groups.values()))
    if unmeasured:
        click.echo(f"{unmeasured} of {len(points)} transcoders have no {measure} and are left out", err=True)
    if output is not None:
        click.echo(f"{output}: written")


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines of equal columns: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
