"""A feature as a notebook shows it: its numbers, the tokens it fires on and promotes, and its strongest examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.values import visible_token
from tailrace.storage.display import card, line, tokens
from tailrace.storage.errors import SettingsError

_N_EXAMPLES = 5
_N_TOKENS = 6
_WINDOW = 12
"""Tokens shown on each side of an example."""


@dataclass(frozen=True, repr=False)
class FeatureCard:
    """A feature's rows in published tables. A notebook shows them as a page would."""

    index: int
    row: dict[str, Any]
    """Its row of the table ``features``."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Its rows of the table ``examples``; the strongest have the kind ``top``."""

    @classmethod
    def read(cls, path: Path, index: int) -> FeatureCard:
        """Return feature ``index`` of the tables at ``path``; raise SettingsError if there is no such feature."""
        tables = FeatureTables(path)
        if not 0 <= index < tables.n_features:
            raise SettingsError(f"{path}: has no feature {index}; its features are 0 to {tables.n_features - 1}")
        features, examples = (tables.read(name, range(index, index + 1)) for name in ("features", "examples"))
        assert features is not None, "tables always have the table of features"
        return cls(index, features.to_pylist()[0], [] if examples is None else examples.to_pylist())

    @property
    def strongest(self) -> list[dict[str, Any]]:
        """The examples with the largest activations, the largest first."""
        top = [example for example in self.examples if example["kind"] == "top"]
        return sorted(top, key=lambda example: -example["activation"])

    @property
    def fires_on(self) -> list[str]:
        """The tokens of the strongest examples, the most frequent first."""
        return [token for token, _ in Counter(example["token"] for example in self.strongest).most_common(_N_TOKENS)]

    def __repr__(self) -> str:
        return f"Feature {self.index}: on {self.row['frequency']:.2%} of rows, fires on {self.fires_on}"

    def _repr_html_(self) -> str:
        facts = {"on": f"{self.row['frequency']:.2%} of rows", "max": self.row.get("max"), "mean": self.row.get("mean")}
        lists = {
            "fires on": self.fires_on,
            "promotes": (self.row.get("promoted_tokens") or [])[:_N_TOKENS],
            "suppresses": (self.row.get("suppressed_tokens") or [])[:_N_TOKENS],
        }
        named = [line(_chips(texts), name) for name, texts in lists.items() if texts]
        examples = [line(self._passage(example)) for example in self.strongest[:_N_EXAMPLES]]
        return card(f"Feature {self.index}", facts, *named, *examples, note="dead" if self.row["is_dead"] else "")

    def _passage(self, example: dict[str, Any]) -> str:
        here = example["position"] - example["window_start"]
        cut = slice(max(here - _WINDOW, 0), here + _WINDOW + 1)
        texts = [visible_token(text) for text in example["window_tokens"][cut]]
        strengths = [(value or 0.0) / self.row["max"] for value in example["window_activations"][cut]]
        return tokens(texts, strengths, at=here - cut.start)


def _chips(texts: list[str]) -> str:
    return " ".join(f"<code>{escape(visible_token(text))}</code>" for text in texts)
