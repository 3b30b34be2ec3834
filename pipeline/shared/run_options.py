"""Flags that several commands share: where to run and how much to say. They decide nothing about a result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import running
from tailrace.storage.names import home_path, path_problem
from tailrace.storage.parsing import shown

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class HomePath(click.Path):
    """A path in which ~ is the home folder, also where a shell leaves it: ``--out=~/caches``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse what no system has."""
        path = home_path(value)
        if (problem := path_problem(path)) is not None:
            self.fail(f"{shown(str(path))}: {problem}; give another path", param, ctx)
        return super().convert(path, param, ctx)


ARTIFACT = HomePath(file_okay=False, readable=False, path_type=Path)
"""A directory that holds, or will hold, an artifact; one that cannot be read is no mistake in the command."""
FILE = HomePath(dir_okay=False, path_type=Path)
"""A file that is read or written."""
FILE_OR_ARTIFACT = HomePath(readable=False, path_type=Path)

out = click.option("--out", "output", required=True, type=ARTIFACT, help="Directory to write.")
device = running(
    "--device", default="auto", show_default=True, help="auto (a GPU if there is one), cpu, cuda or cuda:1."
)
threads = running(
    "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads of torch; by default its own choice."
)
as_json = running(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON object, and nothing else, on standard output."
)
quiet = running("--quiet", is_flag=True, help="No progress bar and no summary.")
workers = running(
    "--workers",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that share the work, each with --threads; 0: this one does it. Results are the same to the bit for "
    "equal --threads.",
)


def computing(*flags: Decorator) -> Decorator:
    """Return a decorator that adds flags named like fields of Compute to a command, which is given ``compute``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_compute(**given: Any) -> None:
            fields = {field.name: given.pop(field.name) for field in dataclasses.fields(Compute) if field.name in given}
            command(compute=Compute(**fields), **given)

        decorated: Callable[..., None] = with_compute
        for flag in reversed(flags):
            decorated = flag(decorated)
        return decorated

    return decorate


compute = computing(device, threads, quiet)

generation_number = running(
    "--generation",
    metavar="N",
    type=click.IntRange(min=0),
    help="Generation of the cache to read; pipeline info lists them. [default: the newest]",
)


def generation(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--generation`` to a command that reads a ``cache``, which then names that generation of it, too."""

    @wraps(command)
    def with_generation(*, generation: int | None, **given: Any) -> None:
        if generation is not None:
            from tailrace.storage.generations import CacheAt  # with NumPy, which help and wrong flags need not

            if given["cache"] is None:
                raise click.UsageError("--generation: names a generation of a cache; give the cache, or leave it out")
            given["cache"] = CacheAt(given["cache"], generation)
        command(**given)

    return generation_number(with_generation)


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


folders_with_users = click.option(
    "--in",
    "folders",
    metavar="FOLDER",
    multiple=True,
    type=ARTIFACT,
    help="Folder with artifacts that may use what goes; may be repeated. [default: the current directory, and the one "
    "around it]",
)
model_moved = click.option("--model", help="Where the model lies now, if it moved since the cache was made.")
model_elsewhere = click.option(
    "--model", help="Where the language model lies, if not under the name that the transcoders record."
)
matches = click.option(
    "--matches",
    multiple=True,
    type=FILE,
    help="File of `pipeline compare` about two of the tables, to link similar features; may be repeated.",
)
