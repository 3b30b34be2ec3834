"""``pipeline dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("dashboard", cls=SectionCommand)
@click.argument("tables", metavar="TABLES...", nargs=-1, required=True, type=options.ARTIFACT)
@options.out
@settings_options(DashboardSettings)
@options.matches
@options.as_json
@options.quiet
def command(
    tables: tuple[Path, ...],
    output: Path,
    config: Path | None,
    matches: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write a static site of TABLES' features: a list to sort, search and filter, and a page for each.

    \b
    pipeline dashboard tables/gpt2-l8 --out dashboards/gpt2-l8
    pipeline dashboard tables/gpt2-l8 --feature 89,100-200 --out dashboards/some

    Of several tables, or a folder of them, the site has a switch for layer and run, and features are chosen as
    layer8:89:

    \b
    pipeline dashboard tables/smollm2 --out dashboards/smollm2
    pipeline dashboard tables/k16 tables/k32 --out dashboards/both

    It opens from disk: no server, no network. Copy the folder to share it. A link to one feature ends in
    index.html#feature=89.
    """
    settings = read_settings(DashboardSettings, config, given)

    from tailrace.pipeline.dashboard import stage as dashboard

    result = dashboard.run(settings, tables=tables, output=output, matches=matches, quiet=quiet)
    if as_json:
        echo_made(result.path)
    elif not quiet:
        size = f"{result.n_bytes / 1e6:.1f} MB in {result.n_files:,} files"
        click.echo(f"{result.page}: {result.n_features:,} features, {size}; open it in a browser")
