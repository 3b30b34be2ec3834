"""``pipeline curves``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("curves", cls=SectionCommand)
@click.argument("runs", metavar="RUN...", type=options.ARTIFACT, nargs=-1, required=True)
@click.option("--out", "output", type=options.FILE, help="Picture to write: .html, .png or .svg.")
@options.as_json
def command(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Show how training went: loss, FVU, L0, dead features, learning rate and speed, of runs side by side.

    \b
    pipeline curves transcoders/gpt2-l8 --out curves.html
    pipeline curves sweeps/gpt2-l8 transcoders/gpt2-l8 --out curves.png

    A RUN is a transcoder, finished or not, a sweep, or a folder of either. Prints a line for each: how the loss moved
    over the last tenth of the rows, dead features, and held-out FVU beside those of the mean and of a linear map.
    """
    from tailrace.pipeline.curves.picture import labels, write_picture
    from tailrace.training.loop.curves import read_all

    read = read_all(runs)
    if output is not None:
        write_picture(output, read)
    if as_json:
        click.echo(json.dumps({"runs": [run.as_json() for run in read]}, allow_nan=False))
        return
    names = labels([run.name for run in read])
    width = max(map(len, names))
    for name, run in zip(names, read, strict=True):
        about = "" if run.state == "finished" else f"{run.state} after {run.progress}; "
        click.echo(f"{name.ljust(width)}  {about}{run.verdict}")
    if output is not None:
        click.echo(f"{output}: written")
