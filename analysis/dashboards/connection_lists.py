"""Connections of a feature from weights alone, sorted into the lists that its page shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tailrace.analysis.dashboards.rounding import rounded
from tailrace.analysis.dashboards.vocabulary import Vocabulary

Row = dict[str, Any]


def connection_lists(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the lists of one feature, from its rows of the table ``connections``.

    ``tokens``: ``top`` and ``bottom`` de-embeddings, each [token, weight]; ``heads``: [layer, head, norm], the
    strongest first; ``head_tokens``: ``top`` de-embeddings through a ``layer`` and ``head``; ``later``: by ``layer``
    and ``site``, ``top`` and ``bottom`` features that it writes to, each [feature, weight].
    """
    heads = sorted(_of(rows, "head"), key=_rank)
    strength = {(row["layer"], row["head"]): row["rank"] for row in heads}
    through = _grouped(_of(rows, "head_token"), "layer", "head")
    later = _grouped(_of(rows, "feature"), "layer", "site")
    return {
        "tokens": _ends(_of(rows, "token"), lambda row: _place(row, vocabulary)),
        "heads": [[row["layer"], row["head"], rounded(row["weight"])] for row in heads],
        "head_tokens": [
            {"layer": layer, "head": head, "top": _ends(own, lambda row: _place(row, vocabulary))["top"]}
            for (layer, head), own in sorted(through.items(), key=lambda entry: strength[entry[0]])
        ],
        "later": [
            {"layer": layer, "site": site, **_ends(own, lambda row: row["other"])}
            for (layer, site), own in sorted(later.items())
        ],
    }


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in keys), []).append(row)
    return found


def _rank(row: Row) -> int:
    return int(row["rank"])


def _place(row: Row, vocabulary: Vocabulary) -> int:
    return vocabulary.place(row["token"] or "")


def _ends(rows: Sequence[Row], name: Callable[[Row], int]) -> dict[str, list[list[Any]]]:
    """Split rows by rank: those from 0 on fall from the largest weight, those from -1 down rise from the least."""
    top = sorted((row for row in rows if row["rank"] >= 0), key=_rank)
    bottom = sorted((row for row in rows if row["rank"] < 0), key=_rank, reverse=True)
    return {
        end: [[name(row), rounded(row["weight"])] for row in own] for end, own in (("top", top), ("bottom", bottom))
    }
