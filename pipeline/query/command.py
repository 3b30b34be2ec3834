"""``pipeline query``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.query import saved as queries
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.pipeline.query.stage import Format
    from tailrace.pipeline.query.views import Tables


@click.command("query", cls=SectionCommand)
@click.argument("sql", required=False)
@click.option(
    "--tables",
    metavar="[NAME=]PATH",
    multiple=True,
    help="Tables, a folder of them, a sweep or an evaluation; may be repeated. With a NAME, they are NAME.features.",
)
@click.option(
    "--attach",
    "attached",
    metavar="[NAME=]PATH",
    multiple=True,
    help="File of your own (.jsonl, .csv, .parquet) to read as a table NAME; may be repeated.",
)
@click.option("--saved", metavar="NAME", help="Run a ready query instead of SQL; --list tells of them.")
@click.option("--set", "values", metavar="NAME=VALUE", multiple=True, help="Value of $NAME; may be repeated.")
@click.option("--list", "as_list", is_flag=True, help="Show the tables' columns, with meanings, and the ready queries.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]), help="[default: table]")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--out",
    "output",
    type=options.FILE,
    help="File to write the answer to; one that ends in .parquet, .csv or .json is written so.",
)
def command(
    sql: str | None,
    tables: tuple[str, ...],
    attached: tuple[str, ...],
    saved: str | None,
    values: tuple[str, ...],
    as_list: bool,
    form: Format | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Answer one SQL query over tables; each is a view: features, examples, activations and more of `pipeline analyze`,
    runs of a sweep, tokens of an evaluation.

    \b
    pipeline query "SELECT feature, frequency FROM features ORDER BY frequency DESC LIMIT 5" \\
        --tables tables/gpt2-l8
    pipeline query --saved examples --set feature=89 --tables tables/gpt2-l8
    pipeline query "SELECT lang, count(*) FROM rows JOIN docs USING (document) GROUP BY lang" \\
        --tables tables/gpt2-l8 --attach docs=own.jsonl
    pipeline query --list --tables tables/gpt2-l8
    """
    from tailrace.pipeline.query import stage as query
    from tailrace.pipeline.query.views import find_views, parse_attached, parse_tables

    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form}: give one of them")
    form = "json" if as_json else form
    if (sql is not None) + (saved is not None) + as_list != 1:
        raise click.UsageError("give one of SQL, --saved NAME or --list")
    if as_list and (values or output is not None or form not in (None, "table", "json")):
        raise click.UsageError("--list shows its answer as text or --format json; --set and --out do not go with it")
    if not tables and not as_list:
        raise click.UsageError("--tables PATH is missing: tables of `pipeline analyze`, a sweep or an evaluation")
    if as_list:
        _list(parse_tables(tables), parse_attached(attached), form)
        return
    chosen = form or query.format_of(output)
    if chosen == "parquet" and output is None:
        raise click.UsageError("--format parquet needs --out FILE.parquet")
    opened, own = parse_tables(tables), parse_attached(attached)
    empty = ""
    if saved is not None:
        ready = queries.saved_query(saved)
        parameters = ready.values(values)
        ready.check_tables([view.sql_name for view in find_views(opened)])
        sql, empty = ready.sql, ready.empty
    else:
        parameters = queries.parse_values(values)
    assert sql is not None, "checked above"
    # a ready query is of one transcoder's features, and so asked of each in a folder
    each = saved is not None
    answer = query.run(
        sql,
        tables=opened,
        attached=own,
        format=chosen,
        output=output,
        parameters=parameters,
        each=each,
        empty=empty,
    )
    if output is None:
        click.echo(answer, nl=False, color=True)  # else it would leave out what looks like colours in a token
    else:
        click.echo(f"{output}: written")


def _list(tables: Tables, attached: dict[str, Path], form: Format | None) -> None:
    from tailrace.pipeline.query import stage as query

    listed = query.list_tables(tables, attached)
    ready = queries.saved_queries()
    if form == "json":
        columns = listed.to_pylist()
        click.echo(json.dumps({"columns": columns, "queries": queries.as_json(ready)}, indent=2, ensure_ascii=False))
        return
    if listed.num_rows:
        click.echo(query.show_tables(listed))
    click.echo("Ready queries (--saved NAME):\n")
    click.echo(queries.show_queries(ready), nl=False)
