"""``pipeline extend``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from tailrace.pipeline.cache.command import show_result
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand
from tailrace.storage.settings import parse_quantity


@click.command("extend", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option(
    "--tokens",
    required=True,
    help="Training rows the cache shall hold in the end, such as 120M, or all.",
)
@options.model_moved
@click.option("--dataset", help="Where the dataset lies now, if it moved since the cache was made.")
@options.device
@options.threads
@options.quiet
def command(
    cache: Path,
    tokens: str,
    model: str | None,
    dataset: str | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Add training rows to CACHE, continuing its text where it stopped."""
    from tailrace.pipeline.cache import stage

    try:
        n_rows: int | Literal["all"] = "all" if tokens == "all" else int(parse_quantity(tokens))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tokens") from error
    result = stage.extend(cache, n_rows, device=device, threads=threads, quiet=quiet, model=model, dataset=dataset)
    if not quiet:
        show_result(result)
