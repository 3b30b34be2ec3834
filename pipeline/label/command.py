"""``pipeline label``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.label.stage import Change, Imported
    from tailrace.storage.labels import Label

_NOTE = 100
"""Characters of a note that are shown on a line."""
_KEPT = 5
"""Labels that an import left alone of which it is said what they are."""


@click.command("label", cls=SectionCommand)
@click.argument("tables", type=options.ARTIFACT)
@click.argument("features", metavar="[FEATURE]", required=False)
@click.argument("label", metavar="[LABEL]", required=False)
@click.option("--note", help="Anything else worth knowing; an empty one takes it away.")
@click.option("--star/--no-star", "starred", default=None, help="Mark with a star, or take it away.")
@click.option(
    "--import",
    "source",
    type=options.FILE_OR_ARTIFACT,
    help="File of labels to take over: .csv, .jsonl or .parquet, or the folder of delphi's explanations.",
)
@click.option("--replace", is_flag=True, help="With --import: its labels take the place of those that are here.")
@click.option("--export", "output", type=options.FILE, help="File to write all labels to: .csv, .jsonl or .parquet.")
@click.option("--author", help="Who says so. [default: your login; of delphi's explanations, delphi]")
@options.as_json
def command(
    tables: Path,
    features: str | None,
    label: str | None,
    note: str | None,
    starred: bool | None,
    source: Path | None,
    replace: bool,
    output: Path | None,
    author: str | None,
    as_json: bool,
) -> None:
    """Give features of TABLES a label, a note or a star; without any, show what is said of them.

    \b
    pipeline label tables/gpt2-l8 1850 "votes and elections" --note "not sports" --star
    pipeline label tables/gpt2-l8
    pipeline label tables/gpt2-l8 --export labels.csv
    pipeline label tables/gpt2-l8 --import labels.csv

    Of a folder of tables, a feature is layer8:1850, or 8:1850. Labels lie in labels.parquet beside the tables;
    queries, circuits, scores and dashboards show them.
    """
    is_edit = label is not None or note is not None or starred is not None
    if (source is not None) + (output is not None) + (features is not None or is_edit) > 1:
        raise click.UsageError("give one of FEATURE, --import FILE and --export FILE")
    if is_edit and features is None:
        raise click.UsageError("say which feature the label, note or star is of: pipeline label TABLES FEATURE …")
    if replace and source is None:
        raise click.UsageError("--replace goes with --import")

    from tailrace.pipeline.label import stage
    from tailrace.pipeline.query.text_table import render_table

    if source is not None:
        imported = stage.import_labels(tables, source, replace=replace, author=author)
        if as_json:
            options.echo_json({"n_changed": imported.n_changed, "kept": _records(imported.kept, which=1)})
        else:
            click.echo("\n".join(_imported(source, imported)))
    elif output is not None:
        n_labels = stage.export_labels(tables, output)
        if as_json:
            options.echo_json({"path": output, "n_labels": n_labels})
        else:
            click.echo(f"{output}: {n_labels:,} labels written")
    elif features is not None:
        changes = stage.run(tables, [features], label=label, note=note, starred=starred, author=author)
        if as_json:
            options.echo_json({"labels": _records(changes, which=2)})
            return
        for _, before, after in changes:
            was = f" (was {_said(before)})" if before != after and not before.is_empty else ""
            click.echo(f"feature {after.feature}: {_said(after)}{was}")
    else:
        labels = stage.every_label(tables)
        if as_json:
            options.echo_json({"labels": labels.to_pylist()})
        else:
            click.echo(render_table(labels.select(["site", "feature", "starred", "label", "note"]), None), nl=False)


def _records(changes: Sequence[Change], which: Literal[1, 2]) -> list[dict[str, Any]]:
    """Return labels before (1) or after (2) changes, each with its tables, as JSON."""
    return [{"tables": str(change[0]), **vars(change[which])} for change in changes]


def _imported(source: Path, imported: Imported) -> list[str]:
    """Return what an import did, in lines."""
    kept = [f"  {path.name}, feature {one.feature}: {_said(one)}" for path, one, _ in imported.kept]
    more = [f"  and {len(kept) - _KEPT:,} more"] if len(kept) > _KEPT else []
    rest = f"; {len(kept):,} keep what was here, --replace takes the file's:" if kept else ""
    return [f"{source}: {imported.n_changed:,} features labelled{rest}", *kept[:_KEPT], *more]


def _said(label: Label) -> str:
    """Return what is said of a feature on one line, a long note by its beginning."""
    parts = [repr(label.label) if label.label else "no label", *(["starred"] if label.starred else [])]
    parts += [f"note: {textwrap.shorten(label.note, _NOTE, placeholder=' …')}"] if label.note else []
    by = f" [{label.author}, {label.updated:%Y-%m-%d %H:%M} UTC]" if label.updated else ""
    return ", ".join(parts) + by
