"""``pipeline info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("info", cls=SectionCommand)
@click.argument("path", type=options.FILE_OR_ARTIFACT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, which has everything.")
def command(path: Path, as_json: bool) -> None:
    """Show the cache, transcoder, sweep, evaluation or tables at PATH."""
    from tailrace.pipeline.artifacts import info_stage as info

    if as_json:
        click.echo(json.dumps(info.describe(path), indent=2))
        return
    described = info.summarise(path)
    width = max(len(name) for name in described)
    for name, value in described.items():
        click.echo(f"{name:{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
