"""``pipeline rm``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared import units
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.artifacts.listing import Listed


@click.command("rm", cls=SectionCommand)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=options.ARTIFACT)
@options.folders_with_users
@click.option("--force", is_flag=True, help="Do not ask, and remove what others use, too.")
@options.as_json
def command(paths: tuple[Path, ...], folders: tuple[Path, ...], force: bool, as_json: bool) -> None:
    """Remove the artifacts at PATH, finished or not, unless others that stay were made from them.

    \b
    pipeline rm transcoders/first-try
    pipeline rm runs/a runs/b --in runs --in tables

    In a terminal, asks first. An artifact is gone as a unit: it is never seen in part, whenever the command is killed;
    the same command then deletes the rest.
    """
    from tailrace.pipeline.artifacts import removal

    seen = folders or (Path(), *(path.absolute().parent for path in paths))
    doomed = removal.plan(paths, seen, is_forced=force)
    if doomed and not force and sys.stdin.isatty():
        click.echo("\n".join(_lines(doomed)), err=True)
        click.confirm(f"remove {'these' if len(doomed) > 1 else 'this'}?", abort=True, err=True)
    removal.remove(doomed, paths)
    n_bytes = sum(one.n_bytes for one in doomed)
    if as_json:
        options.echo_json({"removed": [str(one.path) for one in doomed], "bytes": n_bytes})
    else:
        what = f"{len(doomed):,} artifact{'s' * (len(doomed) > 1)}, {units.size(n_bytes)}"
        click.echo(f"removed {what if doomed else 'what an earlier command left'}")


def _lines(doomed: Sequence[Listed]) -> list[str]:
    rows = [(str(one.path), one.kind, units.size(one.n_bytes), units.age(one.modified)) for one in doomed]
    return units.table([("path", "kind", "size", "age"), *rows], right=(2, 3))
