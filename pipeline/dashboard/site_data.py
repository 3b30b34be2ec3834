"""The data files of a site: one for the list of features, one of texts that are searched, and one for every run of
features' pages.

They are made one by one from tables, so that the stage can write all of them and a server only what is asked for.

Data is handed over as scripts: a page opened from disk may load a script of its folder, but may not fetch a file. A
file is one call with a name and a string, gzip in base64, which every browser of 2023 or later unpacks by itself. So
nothing in it is ever read as markup, and it has a third of the bytes of the same JSON (docs/guides/dashboard.md).
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailrace.analysis.dashboards.example_lines import document_text
from tailrace.analysis.dashboards.feature_index import feature_index, feature_passages
from tailrace.analysis.dashboards.feature_pages import FeaturePages
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.analysis.dashboards.glossary import TERMS
from tailrace.analysis.dashboards.values import Vocabulary, rounded, visible_text
from tailrace.storage.artifact import MANIFEST, REQUEST, read_json, unreadable
from tailrace.storage.labels import Label
from tailrace.storage.names import NO_FILE, matching
from tailrace.storage.parsing import parse_json, read_regular
from tailrace.storage.tables import TablesManifest

FEATURES_PER_FILE = 32
"""Features whose pages share a file; see docs/guides/dashboard.md for the measurement."""
MANIFESTS_READ = 1000
"""Artifacts near the tables that are looked at for their transcoder and cache."""
FEATURES_READ = 1024
"""Features whose rows are read from the tables at once; a multiple of ``FEATURES_PER_FILE``."""

INDEX, PASSAGES = "index", "passages"
_LAYER = ("split", "n_rows", "d_sae", "l0_mean", "fvu", "n_dead", "n_dense")

_DOCUMENT = re.compile(r"document-(\d{1,9})-(\d{1,18})-(\d{1,18})-(\d{1,9})")

_FUNCTION = "dashboardData"
"""What `site/data.js` defines to receive the data."""


Similar = Mapping[int, list[list[Any]]]
"""By feature, each [name of the other tables in the address, measure, feature there, similarity, what it is about]."""


class SiteData:
    """The data of a site about some features of some tables."""

    def __init__(
        self,
        tables: FeatureTables,
        features: Sequence[int],
        window: int,
        *,
        has_documents: bool = False,
        similar: Similar | None = None,
    ) -> None:
        """``features`` are sorted; ``window`` is the number of tokens shown on each side of an example.

        ``has_documents`` says that pages may ask for ``document``; ``similar`` has the most similar features of other
        tables of the site.
        """
        self._similar = similar
        self._tables, self._features, self._window = tables, features, window
        self._has_documents = has_documents and tables.has("rows")

    def index(self, labels: Mapping[int, Label]) -> bytes:
        """Return the file of the list, with what is said of its features in ``labels``."""
        return pack(INDEX, {**self._index, **_label_columns(self._features, labels)})

    @cached_property
    def _index(self) -> dict[str, Any]:
        return {"about": self._about(), **feature_index(self._tables, self._features)}

    def names(self) -> list[str]:
        """Return the names of the files of pages, in the order of features, and that of the texts that are searched."""
        return [*(file_name(start) for start in self._starts()), PASSAGES]

    def pages(self, missing: set[str]) -> Iterator[tuple[str, bytes]]:
        """Make the files whose names are in ``missing``, in the order of ``names``; yield name and bytes."""
        for start in range(0, self._tables.n_features, FEATURES_READ):
            within = range(start, min(start + FEATURES_READ, self._tables.n_features))
            wanted = [first for first in self._starts() if first in within and file_name(first) in missing]
            if not wanted:
                continue
            read = range(wanted[0], min(wanted[-1] + FEATURES_PER_FILE, within.stop))
            source = FeaturePages(self._tables, read, window=self._window, n_bands=self._tables.n_bands)
            for first in wanted:
                yield file_name(first), self._file(source, first)
        if PASSAGES in missing:
            yield PASSAGES, pack(PASSAGES, feature_passages(self._tables, self._features))

    def document(self, name: str) -> bytes | None:
        """Make the file of an example's document, which its name says; None for a name of no kept example."""
        match = _DOCUMENT.fullmatch(name)
        if match is None or not self._has_documents:
            return None
        feature, document, context, position = (int(part) for part in match.groups())
        found = document_text(self._tables, feature, document, context, position)
        return None if found is None else pack(name, found)

    def _file(self, source: FeaturePages, first: int) -> bytes:
        own = [feature for feature in self._features if first <= feature < first + FEATURES_PER_FILE]
        vocabulary = Vocabulary()
        records = source.records(own, vocabulary)
        if self._similar is not None:
            records = [{**one, "similar": self._similar.get(one["feature"], [])} for one in records]
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
            "architecture": self._architecture(),
            "text": self._text(),
            "documents": self._has_documents,
            "glossary": TERMS,
            "features_per_file": FEATURES_PER_FILE,
            "n_bands": self._tables.n_bands,
            "version": version("tailrace"),
        }

    def _architecture(self) -> dict[str, Any] | None:
        """Return kind and k of the transcoder, if it lies near the tables, which keep its digest only."""
        near = nearby_transcoder(self._tables.manifest, self._tables.path)
        if near is None or not isinstance(found := near[1].get("architecture"), dict):
            return None
        return {"kind": found.get("kind"), "k": found.get("k")}

    def _text(self) -> dict[str, Any] | None:
        """Return the cache that was read, and the name of its dataset if the cache lies near the tables."""
        cache = self._tables.manifest.inputs.cache
        if cache is None:
            return None
        datasets = (
            read_json(path / REQUEST).get("dataset")
            for path, manifest in _nearby(self._tables.path, cache.cache_id)
            if manifest.get("cache_id") == cache.cache_id and (path / REQUEST).is_file()
        )
        return {"cache": cache.cache_id, "dataset": next((Path(name).name for name in datasets if name), None)}


def nearby_transcoder(of: TablesManifest, tables: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and manifest of the transcoder of ``tables`` if it lies near them."""
    digest = of.inputs.transcoder.digest
    return next((found for found in _nearby(tables, digest) if found[1].get("digest") == digest), None)


def _nearby(tables: Path, text: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and manifest of the artifacts beside the tables, and beside their folder, that mention ``text``.

    Raises ArtifactCorrupt for a manifest that the disk refuses: without it, the site would silently say less.
    """
    home = tables.resolve().parent
    patterns = (f"*/{MANIFEST}", f"*/*/{MANIFEST}", f"*/runs/*/{MANIFEST}")
    manifests = (path for folder in (home, home.parent) for pattern in patterns for path in matching(folder, pattern))
    for path in itertools.islice(manifests, MANIFESTS_READ):
        try:
            data = read_regular(path)
        except (*NO_FILE, ValueError):  # removed a moment ago, or no file
            continue
        except OSError as error:
            raise unreadable(error, path) from error
        with suppress(ValueError):  # of another program, or damaged: `pipeline verify` says so
            if text.encode() in data and isinstance(manifest := parse_json(data), dict):
                yield path.parent, manifest


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
