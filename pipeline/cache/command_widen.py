"""``pipeline widen``."""

from __future__ import annotations

from pathlib import Path

import click

from tailrace.pipeline.cache.command import show_result
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("widen", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option("--layers", help="Layers to add, such as 4,5 or all.")
@click.option("--hooks", multiple=True, help="Sites to add by hook names, as of pipeline cache. May be repeated.")
@options.model_moved
@options.device
@options.threads
@options.quiet
def command(
    cache: Path,
    layers: str | None,
    hooks: tuple[str, ...],
    model: str | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Add layers to CACHE for the rows it holds, by running its recorded contexts again."""
    from tailrace.pipeline.cache import stage

    result = stage.widen(cache, layers, hooks, device=device, threads=threads, quiet=quiet, model=model)
    if not quiet:
        show_result(result)
