"""``pipeline ls``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared import units
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.artifacts.listing import Listed

_SHOWN_NAMES = {"activation-cache": "cache", "cross_layer_transcoder": "cross-layer transcoder"}


@click.command("ls", cls=SectionCommand)
@click.argument("folder", type=options.ARTIFACT, default=".")
@options.as_json
def command(folder: Path, as_json: bool) -> None:
    """List the artifacts under FOLDER: what each is, how large, how good or how far, and what it was made from.

    \b
    pipeline ls
    pipeline ls demo
    pipeline ls runs --json | jq '.artifacts[] | select(.finished | not) | .path'

    FOLDER is the current directory unless given. `pipeline info` shows one artifact, `pipeline rm` removes some.
    """
    from tailrace.pipeline.artifacts.listing import list_artifacts, made_from
    from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing, raise_together

    if not folder.is_dir():
        raise ArtifactMissing(f"{folder}: there is no such folder; check the path")
    problems: list[ArtifactCorrupt] = []
    artifacts = list_artifacts(folder, problems=problems)
    origins = {path: [_name(one.path, folder) for one in uses] for path, uses in made_from(artifacts).items()}
    if as_json:
        listed = [_record(one, folder) | {"made_from": origins[one.path]} for one in artifacts]
        options.echo_json({"folder": str(folder), "artifacts": listed})
    elif artifacts:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in _lines(artifacts, origins, folder):
            click.echo(line if columns is None else units.cut(line, columns))
    elif not problems:
        click.echo(f"{folder}: no artifact lies here or below")
    raise_together(problems)


def _record(one: Listed, folder: Path) -> dict[str, Any]:
    return {
        "path": _name(one.path, folder),
        "kind": one.kind,
        "finished": one.is_finished,
        **({"damaged": True} if one.is_damaged else {}),
        "bytes": one.n_bytes,
        "modified": datetime.fromtimestamp(one.modified, UTC).isoformat(timespec="seconds"),
        **one.facts,
    }


def _lines(artifacts: Sequence[Listed], origins: Mapping[Path, Sequence[str]], folder: Path) -> Iterator[str]:
    from tailrace.pipeline.artifacts.listing import shown_facts

    rows = [("path", "kind", "size", "age", "", "made from")]
    for one in artifacts:
        uses = origins[one.path]
        more = f" and {len(uses) - 2} more" if len(uses) > 2 else ""
        facts = shown_facts(one.facts)
        rows.append(
            (
                _name(one.path, folder),
                _SHOWN_NAMES.get(one.kind, one.kind),
                units.size(one.n_bytes),
                units.age(one.modified),
                _state(one, facts),
                ", ".join(uses[:2]) + more,
            )
        )
    yield from units.table(rows, right=(2, 3))
    whole = units.size(sum(one.n_bytes for one in artifacts))
    unfinished = sum(not (one.is_finished or one.is_damaged) for one in artifacts)
    counted = f"{len(artifacts):,} artifact{'s' * (len(artifacts) != 1)}, {whole}"
    yield counted + (f"; {unfinished:,} unfinished" if unfinished else "")


def _state(one: Listed, facts: str) -> str:
    if one.is_damaged:
        return click.style("damaged: its manifest cannot be read", fg="red")
    return facts if one.is_finished else click.style(f"unfinished{facts and ': ' + facts}", fg="yellow")


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else "."
