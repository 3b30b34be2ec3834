"""``pipeline query``."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import query
from pipeline.commands import options


@click.command("query")
@click.argument("sql")
@click.option("--tables", required=True, type=options.ARTIFACT, help="Tables, a sweep or an evaluation.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), help="[default: table]")
@click.option("--out", "output", type=click.Path(dir_okay=False, path_type=Path), help="File to write the answer to.")
def command(sql: str, tables: Path, form: query.Format | None, output: Path | None) -> None:
    """Answer one SQL query over tables; each is a view: features, examples and layers of `pipeline analyze`, runs of a
    sweep, tokens of an evaluation.

    \b
    pipeline query "SELECT feature, frequency FROM features ORDER BY frequency DESC LIMIT 5" \\
        --tables tables/gpt2-l8
    pipeline query "SELECT name, heldout_fvu FROM runs ORDER BY heldout_fvu" --tables sweeps/gpt2-l8
    """
    chosen: query.Format = form or ("parquet" if output and output.suffix == ".parquet" else "table")
    if chosen == "parquet" and output is None:
        raise click.UsageError("--format parquet needs --out FILE.parquet")
    answer = query.run(sql, tables=tables, format=chosen, output=output)
    if output is None:
        click.echo(answer)
    else:
        click.echo(f"{output}: written")
