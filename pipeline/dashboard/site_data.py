"""The data files of a site: one for the list of features, and one for every run of features' pages.

They are made one by one from tables, so that the stage can write all of them and a server only what is asked for.

Data is handed over as scripts: a page opened from disk may load a script of its folder, but may not fetch a file. A
file is one call with a name and a string, gzip in base64, which every browser of 2023 or later unpacks by itself. So
nothing in it is ever read as markup, and it has a third of the bytes of the same JSON (docs/guides/dashboard.md).
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

from tailrace.analysis.dashboards.feature_index import feature_index
from tailrace.analysis.dashboards.feature_pages import FeaturePages
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.values import Vocabulary, rounded, visible_text
from tailrace.storage.labels import Label

FEATURES_PER_FILE = 32
"""Features whose pages share a file; see docs/guides/dashboard.md for the measurement."""
FEATURES_READ = 1024
"""Features whose rows are read from the tables at once; a multiple of ``FEATURES_PER_FILE``."""

INDEX = "index"
_LAYER = ("split", "n_rows", "d_sae", "l0_mean", "fvu", "n_dead", "n_dense")

_FUNCTION = "dashboardData"
"""What `site/data.js` defines to receive the data."""


class SiteData:
    """The data of a site about some features of some tables."""

    def __init__(self, tables: FeatureTables, features: Sequence[int], window: int) -> None:
        """``features`` are sorted; ``window`` is the number of tokens shown on each side of an example."""
        self._tables, self._features, self._window = tables, features, window

    def index(self, labels: Mapping[int, Label]) -> bytes:
        """Return the file of the list, with what is said of its features in ``labels``."""
        return pack(INDEX, {**self._index, **_label_columns(self._features, labels)})

    @cached_property
    def _index(self) -> dict[str, Any]:
        return {"about": self._about(), **feature_index(self._tables, self._features)}

    def names(self) -> list[str]:
        """Return the names of the files of pages, in the order of features."""
        return [file_name(start) for start in self._starts()]

    def pages(self, missing: set[str]) -> Iterator[tuple[str, bytes]]:
        """Make the files of pages whose names are in ``missing``, in the order of features; yield name and bytes."""
        for start in range(0, self._tables.n_features, FEATURES_READ):
            within = range(start, min(start + FEATURES_READ, self._tables.n_features))
            wanted = [first for first in self._starts() if first in within and file_name(first) in missing]
            if not wanted:
                continue
            read = range(wanted[0], min(wanted[-1] + FEATURES_PER_FILE, within.stop))
            source = FeaturePages(self._tables, read, window=self._window, n_bands=self._tables.n_bands)
            for first in wanted:
                yield file_name(first), self._file(source, first)

    def _file(self, source: FeaturePages, first: int) -> bytes:
        own = [feature for feature in self._features if first <= feature < first + FEATURES_PER_FILE]
        vocabulary = Vocabulary()
        records = source.records(own, vocabulary)
        return pack(file_name(first), {"features": records, "vocabulary": vocabulary.texts})

    def _starts(self) -> list[int]:
        return sorted({feature - feature % FEATURES_PER_FILE for feature in self._features})

    def _about(self) -> dict[str, Any]:
        """Return what holds for the site as a whole."""
        manifest, layer = self._tables.manifest, self._tables.layer
        return {
            "model": manifest.model["name"],
            "site": manifest.site.name,
            "hooks": [manifest.site.hook_in, manifest.site.hook_out],
            "layer": {name: rounded(layer[name]) for name in _LAYER if name in layer},
            "transcoder": manifest.inputs.transcoder.digest,
            "features_per_file": FEATURES_PER_FILE,
            "n_bands": self._tables.n_bands,
            "version": version("tailrace"),
        }


def _label_columns(features: Sequence[int], labels: Mapping[int, Label]) -> dict[str, Any]:
    """Return label, note and star of each feature, empty for most; nothing where none has any."""
    own = [labels.get(feature, Label(feature)) for feature in features]
    if all(one.is_empty for one in own):
        return {}
    return {
        "label": [visible_text(one.label) for one in own],
        "note": [visible_text(one.note) for one in own],
        "starred": [int(one.starred) for one in own],
    }


def file_name(first: int) -> str:
    """Return the name of the file with the pages from feature ``first`` on; `site/data.js` makes the same."""
    return f"features-{first:06d}"


def pack(name: str, value: Any) -> bytes:
    """Return the script that hands ``value`` over under ``name``; the same value gives the same bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return f'{_FUNCTION}("{name}", "{packed}");\n'.encode()


def unpack(script: bytes) -> Any:
    """Return what was packed."""
    packed = script.decode().rpartition(', "')[2].removesuffix('");\n')
    return json.loads(gzip.decompress(base64.b64decode(packed)))
