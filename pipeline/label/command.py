"""``pipeline label``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
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
    from tailrace.pipeline.query.stage import render_table

    if source is not None:
        imported = stage.import_labels(tables, source, replace=replace, author=author)
        kept = [f"  {path.name}, feature {one.feature}: {_said(one)}" for path, one, _ in imported.kept]
        click.echo(f"{source}: {imported.n_changed:,} features labelled" + (f"; {len(kept):,} keep what was here, "
                   "--replace takes the file's:" if kept else ""))  # fmt: skip
        for line in [*kept[:_KEPT], *([f"  and {len(kept) - _KEPT:,} more"] if len(kept) > _KEPT else [])]:
            click.echo(line)
    elif output is not None:
        click.echo(f"{output}: {stage.export_labels(tables, output):,} labels written")
    elif features is not None:
        changes = stage.run(tables, [features], label=label, note=note, starred=starred, author=author)
        for _, before, after in changes:
            was = f" (was {_said(before)})" if before != after and not before.is_empty else ""
            click.echo(f"feature {after.feature}: {_said(after)}{was}")
    else:
        labels = stage.every_label(tables)
        columns = ["site", "feature", "starred", "label", "note"]
        click.echo(render_table(labels.select(columns), None), nl=False)


def _said(label: Label) -> str:
    """Return what is said of a feature on one line, a long note by its beginning."""
    parts = [repr(label.label) if label.label else "no label", *(["starred"] if label.starred else [])]
    parts += [f"note: {textwrap.shorten(label.note, _NOTE, placeholder=' …')}"] if label.note else []
    by = f" [{label.author}, {label.updated:%Y-%m-%d %H:%M} UTC]" if label.updated else ""
    return ", ".join(parts) + by
