"""``pipeline shuffle``."""

from __future__ import annotations

from pathlib import Path

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("shuffle", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option("--epoch", type=click.IntRange(min=0), default=0, show_default=True, help="Epoch whose order is written.")
@click.option("--seed", type=int, help="Seed of the epochs; by default the cache's.")
@click.option("--split", type=click.Choice(["train", "heldout"]), default="train", show_default=True, help="Rows.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Worker processes; 0 runs in this one.")
@options.quiet
def command(cache: Path, epoch: int, seed: int | None, split: str, workers: int, quiet: bool) -> None:
    """Write the shuffled order of one epoch of CACHE as sequential shards.

    Not needed for training: an epoch is shuffled while it is read. Worth it with little memory, a slow disk, or many
    readers, at the price of the cache's size on disk.
    """
    from tailrace.pipeline.cache import shuffle

    path = shuffle.run(cache, epoch=epoch, seed=seed, split=split, workers=workers, quiet=quiet)
    if not quiet:
        click.echo(f"{path}: training reads epoch {epoch} from here")
