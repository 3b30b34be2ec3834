"""Write the page that documents the ready queries: ``python -m tailrace.pipeline.query docs/guides/queries.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from tailrace.pipeline.query.saved import SavedQuery, saved_queries, shown

_INTRODUCTION = """\
# Queries

`pipeline query` answers SQL over published tables, in DuckDB's dialect. Every Parquet file, and every folder of them,
is a view under its own name: those of `pipeline analyze` ([tables](../tables.md)) and their `labels`
([labels](labels.md)), `runs` of a sweep, `tokens` of an evaluation. This page is made from the query files by
`python -m tailrace.pipeline.query docs/guides/queries.md`, and a test compares the two.

```bash
pipeline query "SELECT feature, promoted_tokens FROM features WHERE NOT is_dead LIMIT 5" --tables tables/gpt2-l8
pipeline query --list --tables tables/gpt2-l8       # every column with meaning and unit, and the queries below
pipeline query --saved examples --set feature=89 --tables tables/gpt2-l8 --format csv
```

The answer is shown as a table (the first 40 rows), or as `--format csv`, `json` or `parquet`; `--out FILE` writes
it, whole. Tokens with a space at an end are in quotes. A single row that is wider than the terminal has a line for
every column. `$name` in your own SQL is filled in by `--set name=value`. From Python, `tailrace.query(…)` returns an
Arrow table: `.to_pandas()` and `.to_pylist()` are its methods.

**Your own files.** `--attach NAME=PATH`, which may be repeated, reads a .jsonl, .csv or .parquet file as a table of
that name ([guide](own-data.md)).

**Several artifacts.** `--tables` may be repeated. Artifacts with different tables are seen side by side, such as an
analysis and an evaluation of the same transcoder; of artifacts with the same tables each gets a name:

```bash
pipeline query "SELECT a.feature, a.top_token, b.top_token FROM l3.features a JOIN l8.features b USING (feature)" \\
    --tables l3=tables/gpt2-l3 --tables l8=tables/gpt2-l8
```

A folder of tables, such as `pipeline analyze` makes of a folder of transcoders, is one set of views with the rows of
all; the column `folder` says whose a row is:

```bash
pipeline query "SELECT folder, feature, max FROM features WHERE top_token = ' France' ORDER BY max DESC" \\
    --tables demo/circuits/tables
```

A ready query is asked of each of them, one after the other: `--saved densest --set n=5` gives five features of every
folder.

A query can read the tables, what is attached, and nothing else; what DuckDB has to say about SQL it cannot run is shown
as it says it.
Activations are sorted by feature in small pieces, so a query of one feature reads only its own: say
`WHERE feature = 89` rather than computing with the column.

## Ready queries

`--saved NAME` runs one of these; `--set` changes its parameters. They lie in `pipeline/query/sql`, and are good to
start from.
"""


def queries_page() -> str:
    """Return ``docs/guides/queries.md``."""
    return "\n".join([_INTRODUCTION, *map(_section, saved_queries().values())])


def _section(query: SavedQuery) -> str:
    lines = [f"### {query.name}", "", query.description, "", f"Reads {', '.join(f'`{name}`' for name in query.needs)}."]
    if query.empty:
        lines += ["", f"No rows: {query.empty}"]
    if query.parameters:
        lines += ["", "| parameter | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{one.name}` | {one.kind} | `{shown(one.default)}` | {one.meaning} |" for one in query.parameters]
    return "\n".join([*lines, "", "```sql", query.sql, "```", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(queries_page())
