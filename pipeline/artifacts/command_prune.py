"""``pipeline prune``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared import units
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.artifacts.removal import Pruning


@click.command("prune", cls=SectionCommand)
@click.argument("cache", type=options.ARTIFACT)
@click.option("--keep", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Generations kept.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and delete nothing.")
@options.folders_with_users
@click.option("--force", is_flag=True, help="Do not ask, and strand unfinished artifacts.")
@options.as_json
def command(cache: Path, keep: int, dry_run: bool, folders: tuple[Path, ...], force: bool, as_json: bool) -> None:
    """Delete what only older generations of CACHE need: rows, records and epochs as they were before it grew.

    \b
    pipeline prune caches/gpt2-l8 --dry-run
    pipeline prune caches/gpt2-l8 --keep 2

    Refused while a process reads such a generation, and if an unfinished artifact was begun with it. In a terminal,
    asks first. A prune that was killed is finished by the next one.
    """
    from tailrace.pipeline.artifacts import removal

    seen = folders or (Path(), cache.absolute().parent)
    planned = removal.plan_pruning(cache, keep, seen, is_forced=force or dry_run)
    doomed, n_bytes = planned.doomed, planned.n_bytes
    if not dry_run:
        if n_bytes and not force and sys.stdin.isatty():
            click.echo("\n".join(_lines(planned)), err=True)
            click.confirm("delete this?", abort=True, err=True)
        planned.kept.prune(planned.oldest)
    if as_json:
        users = [str(one.path) for one in planned.users]
        options.echo_json({"pruned": doomed, "bytes": n_bytes, "made_from_them": users, "dry_run": dry_run})
    else:
        pruned = f"pruned, {units.size(n_bytes)}" if doomed or n_bytes else "nothing to prune"
        click.echo("\n".join(_lines(planned) if dry_run else [f"{cache}: {pruned}"]))


def _lines(planned: Pruning) -> Iterator[str]:
    doomed = planned.doomed
    yield from (
        line for number, line in zip(planned.kept.numbers, planned.kept.lines(), strict=True) if number in doomed
    )
    number = f"{len(doomed)} generation{'s' * (len(doomed) != 1)}"
    yield f"{planned.kept.root}: {number} and {units.size(planned.n_bytes)} to delete"
    for one in planned.users:
        if one.is_finished:
            yield f"{one.path}: made from a generation that goes"
        else:
            yield f"{one.path}: unfinished, begun with a generation that goes; without --force, it is kept"
