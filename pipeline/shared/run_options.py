"""Flags that several commands share: where to run and how much to say. They decide nothing about a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import running

ARTIFACT = click.Path(file_okay=False, path_type=Path)
"""A directory that holds, or will hold, an artifact."""

out = click.option("--out", "output", required=True, type=ARTIFACT, help="Directory to write.")
device = running("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
threads = running(
    "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads of torch; by default its own choice."
)
quiet = running("--quiet", is_flag=True, help="No progress bar and no summary.")


def compute(command: Callable[..., None]) -> Callable[..., None]:
    """Add --device, --threads and --quiet to a command, which is given them as ``compute``."""

    @wraps(command)
    def with_compute(*, device: str, threads: int | None, quiet: bool, **given: Any) -> None:
        command(compute=Compute(device, threads, quiet), **given)

    return device(threads(quiet(with_compute)))


model_moved = click.option("--model", help="Where the model lies now, if it moved since the cache was made.")
model_elsewhere = click.option(
    "--model", help="Where the language model lies, if not under the name that the transcoders record."
)
