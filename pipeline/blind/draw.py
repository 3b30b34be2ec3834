"""The stages ``pipeline blind draw`` and ``tally``: features of two dictionaries on pages that hide which is whose."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tailrace.analysis.blind.sampling import Drawn, LiveRule, draw
from tailrace.analysis.blind.tally import Tally, tally
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.artifacts.manifests import DrawManifest
from tailrace.pipeline.blind import ratings
from tailrace.pipeline.blind.sealed import seal, unseal
from tailrace.pipeline.blind.settings import DrawSettings
from tailrace.pipeline.dashboard.blind import write_blind_page
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.shared.pages import html_document
from tailrace.pipeline.shared.stage import Made, publish_stage
from tailrace.storage.artifact import canonical_json, make_directory, write_atomically
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import SettingsError
from tailrace.storage.shuffle import philox, random_permutation
from tailrace.storage.tables import TablesManifest, read_table

KIND = DrawManifest.of_kind
KEY, FORM, ITEMS = "key.sealed", "rate.html", "items"
SITE = Path(__file__).parent / "site"
_UNSEEN = ("coactivation_floor", "without_model")
"""Settings of tables that change nothing a page shows."""

TALLY = "tally.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawResult:
    """A published draw."""

    path: Path
    n_items: int
    commitment: str
    """Digest of the sealed key: write it down, and the key cannot be changed unseen."""


@dataclass(frozen=True)
class Dictionary:
    """Tables of one layer's features, or of all layers in a folder, whose features are then numbered through."""

    path: Path
    tables: tuple[Path, ...]
    manifests: tuple[TablesManifest, ...]

    @classmethod
    def open(cls, path: Path) -> Dictionary:
        """Read the manifests; the errors are those of ``Manifest.read``."""
        tables = each_artifact([path], analyze.KIND)
        return cls(path, tuple(tables), tuple(TablesManifest.read(one) for one in tables))

    @property
    def reference(self) -> dict[str, Any]:
        """What tells it from every other."""
        digests = [manifest.digest for manifest in self.manifests]
        return {"digest": digests[0]} if len(digests) == 1 else {"digests": digests}

    @cached_property
    def liveness(self) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
        """(features,) the log₁₀ of each frequency, and on how many rows each fires."""
        columns = pa.concat_tables(
            [read_table(one / "features.parquet", ["log10_frequency", "n_active"]) for one in self.tables]
        )
        return columns["log10_frequency"].to_numpy().astype(np.float64), columns["n_active"].to_numpy()

    @cached_property
    def starts(self) -> list[int]:
        """The number of each table's first feature, and of all features."""
        sizes = [read_table(one / "features.parquet", ["feature"]).num_rows for one in self.tables]
        return [0, *np.cumsum(sizes).tolist()]

    def place(self, feature: int) -> tuple[Path, int]:
        """Return the tables that a feature is in, and its number there."""
        index = int(np.searchsorted(self.starts, feature, "right")) - 1
        return self.tables[index], feature - self.starts[index]

    def label(self, feature: int) -> int | str:
        """Return a feature's number, of several tables after the name of its own."""
        path, own = self.place(feature)
        return own if len(self.tables) == 1 else f"{path.name}:{own}"


@dataclass(frozen=True)
class _Item:
    number: int
    dictionary: int
    drawn: Drawn


def run(settings: DrawSettings, *, tables: Sequence[Path], output: Path) -> DrawResult:
    """Publish pages, an empty ratings file and a sealed key at ``output``; return at once if they are there already.

    ``tables`` are of two dictionaries; a folder of tables, as of all layers of a transcoder, is one. Raises
    SettingsError unless there are two, made with the same settings from the same cache (or the pages would tell them
    apart), or if a dictionary has too few live features.
    """
    dictionaries = [Dictionary.open(path) for path in tables]
    _check(dictionaries)
    items = _draw_items(settings, dictionaries)

    def make(path: Path) -> Made:
        files = _write_pages(path, items, dictionaries, settings.window)
        key = {"tables": _names(dictionaries), "items": [_record(item, dictionaries) for item in items]}
        commitment = seal(path / KEY, key)
        _write_form(path / FORM, len(items), commitment)
        ratings.write_blank(path / ratings.FILE, len(items))
        logger.info("wrote %d items", len(items))
        # The ratings are the rater's to change, so they are no file of the artifact.
        record = {"n_items": len(items), "commitment": commitment}
        return Made(record, [*files, KEY, FORM], ("tailrace", "pyarrow"), beside=[ratings.FILE])

    inputs = [one.reference for one in dictionaries]
    publish_stage(output, KIND, {"settings": settings.model_dump(mode="json"), "inputs": inputs}, make)
    return read_result(output)


def read_result(path: Path) -> DrawResult:
    """Return what a published draw says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = DrawManifest.read(path)
    return DrawResult(path, manifest.n_items, manifest.commitment)


def item_page(number: int) -> str:
    """Return the name of an item's page inside the artifact."""
    return f"{ITEMS}/{number:04d}.html"


def _check(dictionaries: Sequence[Dictionary]) -> None:
    if len(dictionaries) != 2:
        raise SettingsError(f"give two artifacts of tables, each after --tables; there is {len(dictionaries)}")
    first, second = dictionaries
    if {one.digest for one in first.manifests} & {one.digest for one in second.manifests}:
        raise SettingsError(f"{first.path} and {second.path} are the same tables; give two different ones")
    there = first.manifests[0]
    found: dict[str, None] = {}
    for one in (*first.manifests[1:], *second.manifests):
        models = list_model_differences(there.model, one.model)
        lines = [*list_differences(_seen(there), _seen(one)), *(f"model.{line}" for line in models)]
        found |= dict.fromkeys(lines)
    if found:
        raise SettingsError(
            f"{first.path} and {second.path}: were not made in the same way, so that pages would tell which dictionary "
            "an item is from; analyze both with the same settings over the same cache or text ('there' is the first):\n"
            + "\n".join(f"  {line}" for line in found)
        )


def _seen(manifest: TablesManifest) -> dict[str, Any]:
    """Return what decides how examples look: settings, but for those of other tables and columns, and the rows."""
    settings = {key: value for key, value in manifest.settings.items() if key not in _UNSEEN}
    inputs = manifest.inputs
    if inputs.cache is not None:
        return {**settings, "cache": inputs.cache.cache_id}
    return {**settings, "live": inputs.live, "text": inputs.text}


def _draw_items(settings: DrawSettings, dictionaries: Sequence[Dictionary]) -> list[_Item]:
    rule = LiveRule(settings.min_log10_frequency, settings.min_active)
    samples, problems = [], []
    for index, one in enumerate(dictionaries):
        try:
            sample = draw(*one.liveness, settings.n, rule, settings.seed, str(index))
        except SettingsError as error:
            problems.append(f"{one.path}: dictionary {error}")
        else:
            samples += [(index, drawn) for drawn in sample]
    if problems:
        raise SettingsError("\n".join(problems))
    order = random_permutation(philox(settings.seed, "blind/order"), len(samples))
    return [_Item(number, *samples[place]) for number, place in enumerate(order.tolist(), start=1)]


def _write_pages(output: Path, items: Sequence[_Item], dictionaries: Sequence[Dictionary], window: int) -> list[str]:
    """Write the items' pages in the order of their numbers: not even the files' times are to tell anything."""
    make_directory(output / ITEMS)
    rows = {
        name: [
            _rows(one, f"{name}.parquet", [item.drawn.feature for item in items if item.dictionary == index])
            for index, one in enumerate(dictionaries)
        ]
        for name in ("features", "examples")
    }
    for item in items:
        (row,) = rows["features"][item.dictionary][item.drawn.feature]
        shown = rows["examples"][item.dictionary][item.drawn.feature]
        write_blind_page(output / item_page(item.number), row, shown, item.number, window=window)
    return [item_page(item.number) for item in items]


def _rows(dictionary: Dictionary, file: str, wanted: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Return a table's rows of the features drawn from one dictionary, by feature."""
    rows: dict[int, list[dict[str, Any]]] = {feature: [] for feature in wanted}
    for path, start in zip(dictionary.tables, dictionary.starts, strict=False):
        own = [dictionary.place(feature)[1] for feature in wanted if dictionary.place(feature)[0] == path]
        if own:
            for row in read_table(path / file, where=pc.field("feature").isin(own)).to_pylist():
                rows[start + row["feature"]].append(row)
    return rows


def _names(dictionaries: Sequence[Dictionary]) -> list[dict[str, Any]]:
    """Return what a tally calls the dictionaries: their folders' names, numbered where these are the same."""
    names = [one.path.resolve().name for one in dictionaries]
    if names[0] == names[1]:
        names = [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    return [{"name": name, **one.reference} for name, one in zip(names, dictionaries, strict=True)]


def _record(item: _Item, dictionaries: Sequence[Dictionary]) -> dict[str, Any]:
    label = dictionaries[item.dictionary].label
    return {
        "item": item.number,
        "dictionary": item.dictionary,
        "feature": label(item.drawn.feature),
        "replaced": [label(feature) for feature in item.drawn.replaced],
    }


def _write_form(path: Path, n_items: int, commitment: str) -> None:
    """Write the page that shows the items one after the other and saves what is said of them."""
    body, style, script = ((SITE / f"rate.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    facts = {"n_items": n_items, "draw": commitment, "columns": list(ratings.COLUMNS), "file": ratings.FILE}
    page = html_document("Blind rating", body, style=style, scripts=[script], data=facts, has_files=True)
    write_atomically(path, page.encode())


@dataclass(frozen=True)
class TallyResult:
    """The ratings of two dictionaries, counted."""

    path: Path
    """File with everything: counts, and of each item whose it is and what was said of it."""
    names: tuple[str, str]
    tally: Tally


def tally_ratings(draw: Path, *, ratings_file: Path | None = None) -> TallyResult:
    """Count the ratings of a published draw and write ``tally.json`` beside it.

    Ratings are read from ``ratings.csv`` of the draw unless told otherwise, and all of them must be there before the
    key is opened. Raises SettingsError with everything that is wrong with them, ArtifactCorrupt for another key.
    """
    manifest = DrawManifest.read(draw)
    rated = ratings.read_ratings(ratings_file or draw / ratings.FILE, manifest.n_items)
    key = unseal(draw / KEY, manifest.commitment)
    by_dictionary = [[rated[item["item"]] for item in key["items"] if item["dictionary"] == place] for place in (0, 1)]
    counted = tally(*by_dictionary)
    names = (key["tables"][0]["name"], key["tables"][1]["name"])
    items = [{**item, **asdict(rated[item["item"]])} for item in key["items"]]
    write_atomically(draw / TALLY, canonical_json(_tally_record(names, counted, key, items)))
    return TallyResult(draw / TALLY, names, counted)


def _tally_record(
    names: tuple[str, str], counted: Tally, key: dict[str, Any], items: list[dict[str, Any]]
) -> dict[str, Any]:
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
