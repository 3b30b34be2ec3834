"""``pipeline info``."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared import units
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("info", cls=SectionCommand)
@click.argument("path", type=options.FILE_OR_ARTIFACT)
@options.generation_number
@options.as_json
def command(path: Path, generation: int | None, as_json: bool) -> None:
    """Show the cache, transcoder, sweep, evaluation or tables at PATH.

    Of a cache that has grown, its generations are listed, with what pruning each would free.
    """
    from tailrace.pipeline.artifacts import info_stage as info

    if as_json:
        click.echo(json.dumps(info.describe(path, generation), indent=2))
        return
    described = info.summarise(path, generation)
    width = max(len(name) for name in described)
    columns = max(40, units.width() - width - 2) if sys.stdout.isatty() else sys.maxsize
    for name, value in described.items():
        first, *more = textwrap.wrap(_text(name, value), columns, break_on_hyphens=False) or [""]
        click.echo(f"{click.style(name, dim=True)}{' ' * (width - len(name))}  {first}")
        for line in more:
            click.echo(f"{'':{width}}  {line}")


def _text(name: str, value: Any) -> str:
    if name.startswith("bytes"):
        return units.size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
