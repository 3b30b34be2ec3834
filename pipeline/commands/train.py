"""``pipeline train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import train
from pipeline.commands import options
from pipeline.options import read_settings, settings_options
from training.settings import TrainSettings


@click.command("train")
@click.argument("cache", type=options.ARTIFACT)
@options.out
@settings_options(TrainSettings)
@click.option("--fresh", is_flag=True, help="Throw an unfinished run at --out away instead of continuing it.")
@click.option("--checkpoint-steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps between.")
@options.device
@options.threads
@options.quiet
def command(
    cache: Path,
    output: Path,
    config: Path | None,
    fresh: bool,
    checkpoint_steps: int,
    device: str,
    threads: int | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Train a transcoder on one site of CACHE.

    \b
    pipeline train caches/gpt2-l8 --architecture topk --k 64 --out transcoders/gpt2-l8

    Continues where it stopped if it was interrupted. No language model is loaded.
    """
    settings = read_settings(TrainSettings, config, given)
    result = train.run(
        settings,
        cache=cache,
        output=output,
        device=device,
        threads=threads,
        quiet=quiet,
        fresh=fresh,
        checkpoint_steps=checkpoint_steps,
    )
    if not quiet:
        click.echo(f"{result.path}: {show_metrics(result.metrics)}")
        if (score := result.metrics.get("heldout")) and score["fvu"] > 1:
            click.echo(
                "warning: FVU above 1 is worse than always predicting the mean; train for longer, or with a lower --lr",
                err=True,
            )


def show_metrics(metrics: dict[str, Any]) -> str:
    """Return the held-out score in one line."""
    score = metrics.get("heldout")
    if not score:
        return f"{metrics['steps']:,} steps; no held-out rows to score on"
    return (
        f"{metrics['steps']:,} steps, held-out FVU {score['fvu']:.4f}, L0 {score['l0']:.1f}, "
        f"dead features {score['dead_fraction']:.1%}"
    )
