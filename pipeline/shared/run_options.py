"""Flags that several commands share: where to run and how much to say. They decide nothing about a result."""

from __future__ import annotations

from pathlib import Path

import click

from tailrace.pipeline.shared.sections import running

ARTIFACT = click.Path(file_okay=False, path_type=Path)
"""A directory that holds, or will hold, an artifact."""

out = click.option("--out", "output", required=True, type=ARTIFACT, help="Directory to write.")
device = running("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
threads = running(
    "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads of torch; by default its own choice."
)
quiet = running("--quiet", is_flag=True, help="No progress bar and no summary.")
model_moved = click.option("--model", help="Where the model lies now, if it moved since the cache was made.")
model_elsewhere = click.option(
    "--model", help="Where the language model lies, if not under the name that the transcoders record."
)
