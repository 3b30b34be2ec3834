"""``pipeline cache``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand, running

if TYPE_CHECKING:
    from tailrace.pipeline.cache.budget import Budget
    from tailrace.pipeline.cache.stage import CacheResult


@click.command("cache", cls=SectionCommand)
@options.out
@settings_options(CacheSettings)
@click.option("--dry-run", is_flag=True, help="Measure for a moment, print rows, bytes and hours, and write nothing.")
@running("--workers", metavar="N", type=click.IntRange(min=0), default=0, help="Worker processes; 0 runs in this one.")
@running(
    "--scheduler",
    help="Address of a Dask scheduler to use instead of --workers; it must be your own and secured (tls://...), since "
    "whoever reaches it runs code as you.",
)
@running("--compile", "compile_model", is_flag=True, help="Compile the model's MLPs with torch.compile.")
@options.device
@options.threads
@options.quiet
def command(
    output: Path,
    config: Path | None,
    dry_run: bool,
    workers: int,
    scheduler: str | None,
    compile_model: bool,
    device: str,
    threads: int | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Cache a language model's MLP inputs and outputs on text.

    \b
    pipeline cache --model gpt2 --layers 8 --dataset Skylion007/openwebtext \\
        --tokens 60M --out caches/gpt2-l8

    Continues where it stopped if it was interrupted.
    """
    settings = read_settings(CacheSettings, config, given)

    from tailrace.pipeline.cache import stage as cache
    from tailrace.pipeline.cache.budget import plan_budget
    from tailrace.pipeline.cache.units import Workers

    if dry_run:
        show_budget(plan_budget(settings, output=output, device=device, threads=threads))
        return
    on = Workers(workers, scheduler, threads) if workers or scheduler else None
    result = cache.run(
        settings,
        output=output,
        device=device,
        threads=threads,
        compile_model=compile_model,
        workers=on,
        quiet=quiet,
    )
    if not quiet:
        show_result(result)


def show_result(result: CacheResult) -> None:
    """Print what a cache holds now."""
    from tailrace.storage.cache_format import SPLITS

    splits = result.cache.manifest["splits"]
    rows = ", ".join(f"{splits[name]['n_rows']:,} {name} rows" for name in SPLITS if name in splits)
    rate = f" ({result.n_new_rows / result.seconds:,.0f} rows/s)" if result.seconds else ""
    click.echo(f"{result.path}: {rows} of {', '.join(result.cache.sites)}{rate}")
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


def show_budget(budget: Budget) -> None:
    """Print what a cache would cost."""
    from tailrace.pipeline.cache.budget import STORAGE_DTYPES

    rows = "the whole dataset" if budget.n_rows is None else f"{budget.n_rows:,} rows"
    click.echo(f"{rows} of {', '.join(site.name for site in budget.sites)}, shards of {budget.shard_rows:,} rows")
    hours = "" if budget.hours is None else f": about {_time(budget.hours)} in one process"
    click.echo(f"{budget.rows_per_second:,.0f} rows/s measured{hours}")
    for dtype in STORAGE_DTYPES:
        total = budget.total_bytes(dtype)
        whole = "" if total is None else f", {_size(total)} in all"
        if total is not None and total > budget.free_bytes:
            whole += ", which does not fit"
        click.echo(f"  {dtype:9} {budget.row_bytes[dtype]:,} bytes per row{whole}")
    click.echo(f"{budget.free_bytes / 1e9:.1f} GB free; nothing was written")


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} minutes"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
