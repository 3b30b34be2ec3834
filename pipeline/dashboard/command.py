"""``pipeline dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("dashboard", cls=SectionCommand)
@click.argument("tables", type=options.ARTIFACT)
@options.out
@settings_options(DashboardSettings)
@options.as_json
@options.quiet
def command(tables: Path, output: Path, config: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write a static site of TABLES' features: a list to sort, search and filter, and a page for each.

    \b
    pipeline dashboard tables/gpt2-l8 --out dashboards/gpt2-l8
    pipeline dashboard tables/gpt2-l8 --feature 89,100-200 --out dashboards/some

    Of a folder of tables, each gets a site under its own name, and features are chosen as layer8:89.

    It opens from disk: no server, no network. Copy the folder to share it. A link to one feature ends in
    index.html#feature=89.
    """
    settings = read_settings(DashboardSettings, config, given)

    from tailrace.pipeline.dashboard import stage as dashboard

    results = dashboard.run_each(settings, tables=tables, output=output, quiet=quiet)
    if as_json:
        options.echo_made(*(result.page.parent for result in results))
        return
    for result in results:
        if quiet:
            continue
        size = f"{result.n_bytes / 1e6:.1f} MB in {result.n_files:,} files"
        click.echo(f"{result.page}: {result.n_features:,} features, {size}; open it in a browser")
