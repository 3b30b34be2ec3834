"""The stage ``pipeline blind tally``: open the key and count the ratings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailrace.analysis.blind.tally import Tally, tally
from tailrace.pipeline.blind import ratings
from tailrace.pipeline.blind.draw import KEY, KIND
from tailrace.pipeline.blind.sealed import unseal
from tailrace.storage.artifact import canonical_json, read_manifest, write_atomically

FILE = "tally.json"


@dataclass(frozen=True)
class TallyResult:
    """The ratings of two dictionaries, counted."""

    path: Path
    """File with everything: counts, and of each item whose it is and what was said of it."""
    names: tuple[str, str]
    tally: Tally


def run(draw: Path, *, ratings_file: Path | None = None) -> TallyResult:
    """Count the ratings of a published draw and write ``tally.json`` beside it.

    Ratings are read from ``ratings.csv`` of the draw unless told otherwise, and all of them must be there before the
    key is opened. Raises SettingsError with everything that is wrong with them, ArtifactCorrupt for another key.
    """
    manifest = read_manifest(draw, KIND)
    rated = ratings.read_ratings(ratings_file or draw / ratings.FILE, manifest["n_items"])
    key = unseal(draw / KEY, manifest["commitment"])
    by_dictionary = [[rated[item["item"]] for item in key["items"] if item["dictionary"] == place] for place in (0, 1)]
    counted = tally(*by_dictionary)
    names = (key["tables"][0]["name"], key["tables"][1]["name"])
    items = [{**item, **asdict(rated[item["item"]])} for item in key["items"]]
    write_atomically(draw / FILE, canonical_json(_record(names, counted, key, items)))
    return TallyResult(draw / FILE, names, counted)


def _record(names: tuple[str, str], counted: Tally, key: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dictionaries": key["tables"],
        "comparisons": [
            {**asdict(one), "difference": one.difference, "first": asdict(one.first), "second": asdict(one.second)}
            for one in counted.comparisons
        ],
        "mean_score": dict(zip(names, counted.mean_score, strict=True)),
        "p_value": counted.p_value,
        "items": items,
    }
