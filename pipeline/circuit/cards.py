"""What tables say of the features of a circuit from other texts, short enough to be shown beside a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from tailrace.analysis.dashboards.values import visible_text, visible_token
from tailrace.storage.labels import Label, read_labels
from tailrace.storage.tables import read_table

N_EXAMPLES = 4
FEW = 10
"""Rows on which a feature has to fire for its tables to say what it is."""
_CONTEXT = 12
"""Tokens of an example shown on either side."""

Card = dict[str, Any]


def read_cards(tables: Mapping[int, Path], features: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Card]:
    """Return the cards of features (layer, index) whose layer has tables; each file is read once."""
    wanted: dict[int, list[int]] = {}
    for layer, index in sorted(features):
        if layer in tables:
            wanted.setdefault(layer, []).append(index)
    cards = {}
    for layer, indices in wanted.items():
        examples = _examples(tables[layer] / "examples.parquet", indices)
        labels = read_labels(tables[layer])
        for row in _rows(tables[layer] / "features.parquet", indices):
            index = int(row["feature"])
            cards[layer, index] = {
                **({"label": visible_text(labels[index].label)} if index in labels else {}),
                "top_token": row.get("top_token"),
                "is_rare": row.get("n_active") is not None and row["n_active"] < FEW,
                "facts": [*_said(labels.get(index)), *_facts(row)],
                "examples": examples.get(index, []),
            }
    return cards


def _said(label: Label | None) -> list[tuple[str, str]]:
    """Return what people say of a feature."""
    told = [] if label is None else [("label", label.label), ("note", label.note)]
    return [(name, visible_text(text)) for name, text in told if text]


def _rows(path: Path, features: Sequence[int]) -> list[dict[str, Any]]:
    return list(read_table(path, where=pc.field("feature").isin(list(features))).to_pylist())


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is shown of a feature's row; columns that the tables do not have are left out."""
    rare = f", only {n} in all" if (n := row.get("n_active")) is not None and n < FEW else ""
    facts = [("fires on", f"{row['frequency']:.3%} of rows{rare}")]
    if row.get("max") is not None:
        facts.append(("strongest", f"{row['max']:.4g}"))
    if row.get("top_token") is not None:
        facts.append(("top token", f"{row['top_token']!r} in {row['top_token_share']:.0%} of examples"))
    for name in ("promoted", "suppressed"):
        tokens = row.get(f"{name}_tokens")
        if tokens:
            facts.append((name, " ".join(map(repr, tokens[:6]))))
    return facts


def _examples(path: Path, features: Sequence[int]) -> dict[int, list[Card]]:
    """Return the strongest examples of each feature."""
    found: dict[int, list[Card]] = {}
    rows = [row for row in _rows(path, features) if row.get("kind", "top") == "top" and row["rank"] < N_EXAMPLES]
    for row in sorted(rows, key=lambda one: (one["feature"], one["rank"])):
        here = row["position"] - row["window_start"]
        tokens = row["window_tokens"]
        card = {
            "before": "".join(tokens[max(0, here - _CONTEXT) : here]),
            "token": visible_token(tokens[here]),
            "after": "".join(tokens[here + 1 : here + 1 + _CONTEXT]),
        }
        found.setdefault(int(row["feature"]), []).append(card)
    return found
