"""``pipeline blind``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.blind.command_study import study
from tailrace.pipeline.blind.settings import DrawSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.analysis.blind.tally import Comparison, Share
    from tailrace.pipeline.blind.draw import TallyResult


@click.group("blind")
def command() -> None:
    """Judge features without knowing whose they are, or what they fire on."""


command.add_command(study)


@command.command("draw", cls=SectionCommand, short_help="Put features of two dictionaries on pages to be rated.")
@click.option(
    "--tables",
    "tables",
    type=options.ARTIFACT,
    multiple=True,
    required=True,
    help="Tables, or a folder of some; give it twice.",
)
@options.out
@settings_options(DrawSettings)
@options.quiet
def draw(tables: tuple[Path, ...], output: Path, config: Path | None, quiet: bool, **given: Any) -> None:
    """Put features of two dictionaries on pages that do not tell which is whose.

    \b
    pipeline blind draw --tables tables/transcoder --tables tables/sae --n 50 --seed 0 --out blind
    """
    settings = read_settings(DrawSettings, config, given)

    from tailrace.pipeline.blind import draw as draw_stage

    result = draw_stage.run(settings, tables=tables, output=output)
    if not quiet:
        click.echo(f"{result.path}: {result.n_items} items; open {result.path / draw_stage.FORM} to rate them")
        click.echo(f"key sealed, {result.commitment}")


@command.command("tally", short_help="Open the key and count the ratings.")
@click.argument("drawn", metavar="DIR", type=options.ARTIFACT)
@click.option("--ratings", type=options.FILE, help="[default: ratings.csv in DIR]")
def tally(drawn: Path, ratings: Path | None) -> None:
    """Open the key of DIR and count its ratings, once every item is rated."""
    from tailrace.pipeline.blind import draw as draw_stage

    result = draw_stage.tally_ratings(drawn, ratings_file=ratings)
    for line in show_tally(result):
        click.echo(line)
    click.echo(f"{result.path}: written")


def show_tally(result: TallyResult) -> list[str]:
    """Return a table of shares with their 95 % intervals, differences and p-values."""
    head = ("", *result.names, "difference", "p")
    rows = [head, *(_row(one) for one in result.tally.comparisons)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    means = " and ".join(f"{mean:.2f}" for mean in result.tally.mean_score)
    lines.append(f"mean score (no 0, maybe 1, yes 2): {means}, p = {result.tally.p_value:.3g}")
    return lines


def _row(one: Comparison) -> tuple[str, ...]:
    difference = f"{one.difference:+.0%} ({one.low:+.0%} to {one.high:+.0%})"
    return (one.name, _share(one.first), _share(one.second), difference, f"{one.p_value:.3g}")


def _share(share: Share) -> str:
    return f"{share.count}/{share.of} ({share.low:.0%} to {share.high:.0%})"
