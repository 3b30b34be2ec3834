"""``pipeline train``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import saves_config, settings_options
from tailrace.pipeline.shared.sections import SectionCommand, option, running
from tailrace.pipeline.train.from_flags import plan, train_one, train_sweep
from tailrace.pipeline.train.grid import read_grid
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.training.loop.loggers import build_loggers
from tailrace.training.loop.settings import TrainSettings

if TYPE_CHECKING:
    from tailrace.pipeline.train.runs_table import RunOutcome
    from tailrace.pipeline.train.sweep import SweepResult
    from tailrace.storage.generations import CachePath
    from tailrace.training.architectures.manifest import CrossLayerManifest

other_way = partial(option, section="Other ways to train")
logged = partial(option, section="Logging and scoring")
_WORKERS = running(
    "--workers",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that share the runs of a sweep, on a GPU each in turn; 0: this one trains all.",
)


@click.command("train", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT, required=False)
@options.generation
@options.out
@other_way("--live", is_flag=True, help="Train on rows straight from --model on --dataset, without a CACHE.")
@other_way("--sweep", "sweeps", multiple=True, metavar="NAME=VALUE,…", help="Train a run per value. Repeatable.")
@other_way("--sweep-file", type=options.FILE, help="YAML: settings with lists of values, or a list of runs.")
@other_way("--from", "start_from", type=options.ARTIFACT, help="Transcoder to start from, of the same shape.")
@other_way(
    "--shard-features",
    is_flag=True,
    help="Each of the processes that torchrun starts has a slice of the features and sees all rows, for a dictionary "
    "larger than a GPU; without it, each has all features and a slice of the rows.",
)
@settings_options(
    TrainSettings,
    also={"": ModelScoreSettings, "with --live": LiveSettings},
    notes={"model": "With a CACHE: where its model lies now, if one is needed and it moved."},
)
@logged("--tensorboard", is_flag=True, help="Log to tensorboard/ in --out as well.")
@logged("--wandb", "wandb_project", metavar="PROJECT", help="Log to a project of Weights & Biases as well.")
@logged(
    "--reference-names",
    is_flag=True,
    help="Give TensorBoard and W&B the numbers by the names of the original transcoder code too.",
)
@running("--dry-run", is_flag=True, help="Say what training would cost in time, memory and disk; write nothing.")
@running("--fresh", is_flag=True, help="Throw an unfinished run at --out away instead of continuing it.")
@running(
    "--checkpoint-steps",
    metavar="N",
    type=click.IntRange(min=1),
    help="Write a checkpoint every N steps too; by default when a minute, and 20 times what the last ones took, have "
    "passed.",
)
@options.as_json
@options.computing(_WORKERS, options.device, options.threads, options.quiet)
def command(
    cache: CachePath | None,
    output: Path,
    config: Path | None,
    live: bool,
    sweeps: tuple[str, ...],
    sweep_file: Path | None,
    start_from: Path | None,
    tensorboard: bool,
    wandb_project: str | None,
    reference_names: bool,
    dry_run: bool,
    fresh: bool,
    checkpoint_steps: int | None,
    shard_features: bool,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Train a transcoder on one site of CACHE, or several side by side.

    \b
    pipeline train caches/gpt2-l8 --k 64 --out transcoders/gpt2-l8
    pipeline train caches/gpt2-l8 --sweep k=16,32,64 --sweep lr=2e-4,4e-4 --out sweeps/gpt2-l8
    pipeline train --live --model gpt2 --layers 8 --dataset Skylion007/openwebtext \\
        --rows 60M --out transcoders/gpt2-l8

    Continues where it stopped if it was interrupted. From a cache, no language model is loaded, unless it is to
    score the transcoder (--evaluate-model-every) or rows (--resample-by model_loss).
    """
    if live == (cache is not None):
        raise click.UsageError("give --live or CACHE, not both" if live else "give CACHE, or --live with a --model")
    arguments: dict[str, Any] = {
        "cache": cache,
        "live": live,
        "config": config,
        "output": output,
        "compute": compute,
        "fresh": fresh,
        "checkpoint_steps": checkpoint_steps,
        "start_from": start_from,
        "loggers": partial(
            build_loggers,
            tensorboard=tensorboard,
            wandb_project=wandb_project,
            reference_names=reference_names,
        ),
    }
    if dry_run:
        points = read_grid(sweeps, sweep_file) if sweeps or sweep_file else []
        planned = plan(
            points,
            given,
            cache=cache,
            output=output,
            config=config,
            compute=compute,
            shard_features=shard_features,
        )
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            click.echo(planned)
        return
    if sweeps or sweep_file:
        if shard_features:
            raise click.UsageError("--shard-features: is for one transcoder; leave it out, or the sweep")
        if saves_config():
            raise click.UsageError("--save-config: a sweep has settings of several runs; leave it out, or the sweep")
        swept = train_sweep(read_grid(sweeps, sweep_file), given, **arguments)
        if as_json:
            echo_made(swept.path, metrics={run.name: run.metrics for run in swept.runs})
        elif not compute.quiet:
            show_sweep(swept)
        return
    result = train_one(given, shard_features=shard_features, **arguments)

    from tailrace.training.architectures.manifest import CrossLayerManifest, is_cross_layer
    from tailrace.training.loop.curves import read_run

    if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
        return
    if as_json:
        echo_made(result.path)
    elif not compute.quiet:
        layers = show_layers(CrossLayerManifest.read(result.path)) if is_cross_layer(result.path) else ""
        click.echo(f"{result.path}: {layers or show_metrics(result.metrics)}")
        click.echo(read_run(result.path).verdict)
        if (score := result.metrics.get("heldout")) and (score.get("fvu_ordinary", score["fvu"]) or 0) > 1:
            click.echo(
                "warning: FVU above 1 is worse than always predicting the mean; train for longer, or with a lower --lr",
                err=True,
            )


def show_metrics(metrics: dict[str, Any]) -> str:
    """Return the held-out score in one line."""
    score = metrics.get("heldout")
    if not score:
        return f"{metrics['steps']:,} steps; no held-out rows to score on"
    fvu = "undefined" if score["fvu"] is None else f"{score['fvu']:.4f}"  # of outputs that do not vary
    if score.get("fvu_ordinary") is not None:
        fvu = f"{score['fvu_ordinary']:.4f} on the {score['n_ordinary']:,} rows it may learn from ({fvu} on all)"
    return (
        f"{metrics['steps']:,} steps, held-out FVU {fvu}, L0 {score['l0']:.1f}, "
        f"dead features {score['dead_fraction']:.1%}"
    )


def show_layers(manifest: CrossLayerManifest) -> str:
    """Return the held-out scores of a cross-layer transcoder in one line; nothing if it was not scored."""
    layers = manifest.layers
    scores = [layer.get("fvu_ordinary", layer["fvu"]) for layer in layers]
    known = [score for score in scores if score is not None]
    if not known:
        return ""
    rows = " on rows it may learn from" if "fvu_ordinary" in layers[0] else ""
    l0, dead = (sum(layer[name] for layer in layers) / len(layers) for name in ("l0", "dead_fraction"))
    return (
        f"{manifest.metrics.steps:,} steps, held-out FVU of {len(layers)} layers {min(known):.4f} to "
        f"{max(known):.4f}, mean {sum(known) / len(known):.4f}{rows}; L0 {l0:.1f} a layer, dead features {dead:.1%}"
    )


def show_sweep(result: SweepResult) -> None:
    """Print one line for every run, and where the table is."""
    from tailrace.pipeline.train.runs_table import RUNS_TABLE

    width = max(len(outcome.name) for outcome in result.runs)
    for outcome in result.runs:
        click.echo(f"{outcome.name.ljust(width)}  {show_outcome(outcome)}")
    click.echo(f"{result.path / RUNS_TABLE}: written")


def show_outcome(outcome: RunOutcome) -> str:
    """Return how a run ended in one line."""
    from tailrace.pipeline.train.runs_table import FINISHED

    if outcome.status == FINISHED:
        return show_metrics(outcome.metrics)
    return f"diverged after {outcome.metrics['steps']:,} steps: {outcome.metrics['reason']}"
