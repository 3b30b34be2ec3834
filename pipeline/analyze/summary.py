"""A few features of published tables at a glance, for the end of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from tailrace.storage.tables import read_table

_SHORTEST_WORD = 4
_FAMILY_SHARE = (0.2, 0.8)
"""Share of a feature's examples on its top token that tells a family of tokens from a single one."""
_READABLE_FREQUENCY = 0.02


class FeatureLine(NamedTuple):
    """A feature at a glance."""

    feature: int
    frequency: float
    max: float
    top_tokens: list[str]
    """Distinct tokens of its examples, strongest first."""
    example: str
    """The text around its strongest example, whose token stands between » and «."""


def summary(tables: Path, n_features: int = 8, n_tokens: int = 5) -> list[FeatureLine]:
    """Return a few features that are easy to read, no two with the same top token.

    Sparse features on a family of words come first, then those on a single token, dense ones last; features with half
    or fewer of the examples that others have are left out.
    """
    columns = ["feature", "frequency", "max", "top_token", "top_token_id", "top_token_share"]
    features = read_table(tables / "features.parquet", columns, pc.field("n_active") > 0).to_pylist()
    shown = ["feature", "token", "position", "window_start", "window_tokens"]
    is_top = pc.field("kind") == "top"
    strongest = read_table(tables / "examples.parquet", ["feature"], is_top)
    counted = strongest["feature"].value_counts().to_pylist()
    n_examples = {entry["values"]: entry["counts"] for entry in counted}
    enough = max(n_examples.values(), default=0) / 2
    readable = [row for row in features if n_examples[row["feature"]] > enough]
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(readable, key=_readability):
        best.setdefault(row["top_token_id"], row)
    chosen = list(best.values())[:n_features]
    is_chosen = pc.field("feature").isin([row["feature"] for row in chosen])
    examples = read_table(tables / "examples.parquet", shown, is_chosen & is_top).to_pylist()
    return [_line(row, [own for own in examples if own["feature"] == row["feature"]], n_tokens) for row in chosen]


def _readability(feature: dict[str, Any]) -> tuple[bool, bool, bool, float, int]:
    """Order features by how well a few examples show what they are about."""
    is_word = feature["top_token"].strip().isalpha() and len(feature["top_token"].strip()) >= _SHORTEST_WORD
    is_family = _FAMILY_SHARE[0] <= feature["top_token_share"] <= _FAMILY_SHARE[1]
    is_frequent = feature["frequency"] > _READABLE_FREQUENCY
    return is_frequent, not is_word, not is_family, -feature["max"], feature["feature"]


def _line(feature: dict[str, Any], examples: list[dict[str, Any]], n_tokens: int) -> FeatureLine:
    tokens = list(dict.fromkeys(example["token"] for example in examples))[:n_tokens]
    window, place = examples[0]["window_tokens"], examples[0]["position"] - examples[0]["window_start"]
    text = "".join(window[:place]) + "»" + window[place] + "«" + "".join(window[place + 1 :])
    return FeatureLine(feature["feature"], feature["frequency"], feature["max"], tokens, text)
