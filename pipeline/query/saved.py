"""Ready queries of ``pipeline query --saved``: one .sql file each in ``sql/``, which explains itself.

The first comment of a file is its description. Lines ``-- needs TABLE …`` name the tables it reads, lines
``-- set NAME TYPE = DEFAULT: MEANING`` the parameters it has, which stand in its SQL as ``$NAME``, and lines
``-- empty …`` say what an answer without rows does not mean.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailrace.storage.errors import SettingsError
from tailrace.storage.names import matching

Value = str | int | float

_TYPES: dict[str, type[Value]] = {"INTEGER": int, "DOUBLE": float, "VARCHAR": str}
_WIDTH = 110
_SET = re.compile(r"set (\w+) (INTEGER|DOUBLE|VARCHAR) = (.*?): (.*)")

MADE_BY = {
    "activations": "pipeline analyze with --activations other than none",
    "rows": "pipeline analyze with --activations other than none",
    "documents": "pipeline analyze of a cache that keeps columns (pipeline cache --keep-columns id,source)",
    "connections": "pipeline analyze with the model",
    "coactivation": "pipeline analyze",
    "examples": "pipeline analyze",
    "features": "pipeline analyze",
    "layers": "pipeline analyze",
    "labels": "pipeline label",
    "tokens": "pipeline evaluate",
}
"""Which command makes a table, for a query that misses it."""


@dataclass(frozen=True)
class Parameter:
    """What may be set with ``--set``."""

    name: str
    kind: str
    """INTEGER, DOUBLE or VARCHAR."""
    default: Value
    meaning: str


@dataclass(frozen=True)
class SavedQuery:
    """A ready query."""

    name: str
    description: str
    needs: tuple[str, ...]
    """The tables it reads."""
    parameters: tuple[Parameter, ...]
    sql: str
    empty: str = ""
    """What no row does and does not mean."""

    def values(self, given: Sequence[str]) -> dict[str, Value]:
        """Return the value of every parameter, ``given`` as NAME=VALUE or by default.

        Raises SettingsError with everything that is wrong.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        found: dict[str, Value] = {name: parameter.default for name, parameter in known.items()}
        problems = []
        for text in given:
            name, equals, value = text.partition("=")
            if name not in known or not equals:
                parameters = f"the parameters {', '.join(known)}; write NAME=VALUE" if known else "no parameters"
                problems.append(f"--set {text}: the query {self.name} has {parameters}")
                continue
            try:
                found[name] = _TYPES[known[name].kind](value)
            except ValueError:
                problems.append(f"--set {text}: wanted {known[name].kind}, such as {known[name].default}")
        if problems:
            raise SettingsError("\n".join(problems))
        return found

    def check_tables(self, tables: Sequence[str]) -> None:
        """Raise SettingsError unless every table it needs is among ``tables``."""
        missing = [name for name in self.needs if name not in tables]
        if missing:
            makers = "; ".join(f"{name} is made by {MADE_BY[name.rpartition('.')[2]]}" for name in missing)
            advice = f"{makers}; --tables may be given several times"
            names = list(dict.fromkeys(name.partition(".")[0] for name in self.needs))
            if "." in self.needs[0] and not set(names) <= {table.partition(".")[0] for table in tables}:
                advice = f"Give tables these names: {' '.join(f'--tables {name}=PATH' for name in names)}"
            elif any(table.endswith(f".{name}") for name in missing for table in tables):
                advice = "Ready queries read tables of artifacts without a name, --tables PATH"
            raise SettingsError(
                f"the query {self.name} needs {', '.join(self.needs)}; --tables has {', '.join(sorted(tables))}. "
                f"{advice}"
            )


def saved_queries() -> dict[str, SavedQuery]:
    """Return every ready query by name."""
    files = matching(Path(__file__).parent / "sql", "*.sql")
    return {path.stem: read_query(path.stem, path.read_text(encoding="utf-8")) for path in files}


def saved_query(name: str) -> SavedQuery:
    """Return a ready query; raise SettingsError, with the names there are, if there is none of that name."""
    queries = saved_queries()
    if name not in queries:
        near = difflib.get_close_matches(name, queries, n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise SettingsError(
            f"--saved {name}: no such query{meant} The ready queries are {', '.join(queries)}; --list explains them"
        )
    return queries[name]


def read_query(name: str, text: str) -> SavedQuery:
    """Read the text of a query's file."""
    lines = text.splitlines()
    comments = [line.removeprefix("--").strip() for line in lines if line.startswith("--")]
    needs = [table for line in comments if line.startswith("needs ") for table in line.split()[1:]]
    parameters = [_parameter(name, line) for line in comments if line.startswith("set ")]
    empty = [line.removeprefix("empty ") for line in comments if line.startswith("empty ")]
    about = [line for line in comments if line and not line.startswith(("needs ", "set ", "empty "))]
    sql = "\n".join(line for line in lines if not line.startswith("--")).strip()
    return SavedQuery(name, " ".join(about), tuple(needs), tuple(parameters), sql, " ".join(empty))


def parse_values(given: Sequence[str]) -> dict[str, Value]:
    """Read NAME=VALUE of a query that declares no types: whole numbers, numbers, or else text.

    Raises SettingsError where there is no ``=``.
    """
    wrong = [text for text in given if not text.partition("=")[1]]
    if wrong:
        raise SettingsError(f"--set {', '.join(wrong)}: write NAME=VALUE, for $NAME in the SQL")
    return {name: _guess(value) for name, _, value in (text.partition("=") for text in given)}


def show_queries(queries: Mapping[str, SavedQuery]) -> str:
    """Return a paragraph for every query: name, description, parameters with their defaults."""
    lines: list[str] = []
    for name, query in queries.items():
        lines.append(name)
        lines += textwrap.wrap(query.description, _WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += [f"  --set {one.name}={shown(one.default)}  {one.meaning}" for one in query.parameters]
    return "\n".join(lines) + "\n"


def as_json(queries: Mapping[str, SavedQuery]) -> list[dict[str, Any]]:
    """Return the queries as JSON values."""
    return [asdict(query) for query in queries.values()]


def shown(value: Value) -> str:
    """Return a value as a shell takes it."""
    text = str(value)
    return f"'{text}'" if text != text.strip() or not text else text


def _parameter(query: str, line: str) -> Parameter:
    match = _SET.fullmatch(line)
    assert match is not None, f"{query}.sql: {line!r} is not 'set NAME TYPE = DEFAULT: MEANING'"
    name, kind, default, meaning = match.groups()
    return Parameter(name, kind, _TYPES[kind](default.strip("'")), meaning)


def _guess(value: str) -> Value:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
