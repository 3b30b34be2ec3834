"""The stage ``pipeline dashboard``: published tables in, a static site of feature pages out.

Needs neither the language model nor the transcoder, and no torch: everything shown is in the tables.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.dashboard import sites
from tailrace.pipeline.dashboard.blind import write_blind_page
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import INDEX, Similar, SiteData
from tailrace.pipeline.shared.feature_selection import parse_layer_features
from tailrace.pipeline.shared.pages import COLOURS, TOOLTIP, html_document
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.stage import Made, publish_stage
from tailrace.storage.artifact import (
    JSON,
    MANIFEST,
    REQUEST,
    FileRecord,
    canonical_json,
    check_files,
    checksum_bytes,
    checksum_file,
    describe_files,
    make_directory,
    read_json,
    read_sealed,
    remove_directory,
    sync_directory,
    write_atomically,
)
from tailrace.storage.cache_format import DRAFT, seal_path
from tailrace.storage.draft import Lock
from tailrace.storage.errors import ArtifactBusy, ArtifactError, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.labels import Label, labels_digest, read_labels
from tailrace.storage.names import LOCK, entries_below
from tailrace.storage.parsing import read_regular

KIND = DashboardManifest.of_kind
_SEALS = seal_path(Path(), ".").as_posix()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DashboardResult:
    """A published site."""

    path: Path
    n_features: int
    n_files: int
    n_bytes: int

    @property
    def page(self) -> Path:
        """What to open in a browser."""
        return self.path / "index.html"


def run(
    settings: DashboardSettings,
    *,
    tables: Path | Sequence[Path],
    output: Path,
    matches: Sequence[Path] = (),
    quiet: bool = False,
) -> DashboardResult:
    """Publish the site of ``tables`` at ``output``; return at once if it is there already, with the labels of today.

    A folder stands for the tables in it; ``matches`` are files of `pipeline compare` about some of them. Of
    several, features are chosen as ``layer8:89``, and tables of which none is chosen are left out. A run that was
    interrupted continues with the pages that are missing or changed since. Raises ArtifactMissing, ArtifactIncomplete
    or ArtifactMismatch for what is no tables artifact or another site at ``output``, SettingsError for features that
    do not exist and for tables of different models, StorageFull.
    """
    opened = sites.open_tables([tables] if isinstance(tables, Path) else tables)
    parts = _parts(settings, opened, sites.read_matches(matches, opened))
    names = {key: part.tables.manifest.site.name if len(opened) == 1 else key for key, part in parts.items()}
    digests = {key: {"digest": part.tables.manifest.digest} for key, part in parts.items()}
    inputs: dict[str, Any] = {"tables": digests[""] if "" in parts else digests}
    if labelled := {names[key]: labels_digest(part.labels) for key, part in parts.items() if part.labels}:
        inputs["labels"] = labelled
    if matches:
        inputs["matches"] = sorted(checksum_file(path) for path in matches)

    def make(path: Path) -> Made:
        written = {} if settings.blind else _write_site(parts, settings, path, quiet)
        files = _write_blind(parts, settings, path, quiet) if settings.blind else list(written)
        first = next(iter(parts.values())).tables.manifest
        several = {key: part.tables.manifest.site.as_json() for key, part in parts.items()}
        record = {
            "model": first.model,
            "site": first.site.as_json(),
            **({} if "" in parts else {"sites": several}),
            "n_features": sum(len(part.features) for part in parts.values()),
        }
        return Made(record, files, ("tailrace", "pyarrow"), beside=[_SEALS], written=written)

    request = {"settings": settings.model_dump(mode="json"), "inputs": inputs}
    _reopen_for_labels(output, request)
    publish_stage(output, KIND, request, make)
    _remove_seals(output)  # also what a process left that was killed right after it had published
    return read_result(output)


def _remove_seals(output: Path) -> None:
    """Delete the seals of a published site, unless a process is making it anew already."""
    with suppress(ArtifactBusy):
        lock = Lock(output)
        try:
            if (output / MANIFEST).exists():
                remove_directory(output / _SEALS)
                with suppress(OSError):  # there is none, or it holds what is not ours
                    (output / DRAFT).rmdir()
        finally:
            lock.release()


def _reopen_for_labels(output: Path, request: Mapping[str, JSON]) -> None:
    """Turn a site that differs from the request in its labels alone into an unfinished one, which then is made on.

    Its pages stay if they are as they were published, by this version, and show no labels of similar features.
    """
    if not _differs_in_labels(output, request):
        return
    lock = Lock(output)
    try:
        if not _differs_in_labels(output, request):
            return
        files: Mapping[str, FileRecord] = {}
        stays = False
        if (output / MANIFEST).exists():
            manifest = DashboardManifest.read(output)
            files = manifest.files
            stays = (
                manifest.versions.get("tailrace") == version("tailrace") and "matches" not in manifest.request["inputs"]
            )
            (output / MANIFEST).unlink()
            sync_directory(output)
        left = {name for name in files if stays and name.startswith("data/")}
        left -= {name for name in left if check_files(output, {name: files[name]})}
        for name in left:
            _seal(output, name, files[name].checksum)
        for path in entries_below(output):
            name = path.relative_to(output).as_posix()
            if name not in {*left, LOCK, REQUEST} and (name in files or name.startswith(("data/", "site/"))):
                path.unlink()
        write_atomically(output / REQUEST, canonical_json({"format": ARTIFACT_FORMATS[KIND], **request}))
    finally:
        lock.release()


def _differs_in_labels(output: Path, request: Mapping[str, JSON]) -> bool:
    """Return whether what lies at a path is the site asked for, but for its labels."""
    try:
        found = (
            read_sealed(output / MANIFEST) if (output / MANIFEST).exists() else {"request": read_json(output / REQUEST)}
        )
    except (ArtifactError, OSError):  # opening it says what is wrong
        return False
    there, asked = found.get("request"), json.loads(canonical_json({"format": ARTIFACT_FORMATS[KIND], **request}))
    if found.get("kind", KIND) != KIND or not isinstance(there, dict) or not isinstance(there.get("inputs"), dict):
        return False
    bare = [
        {**one, "inputs": {name: of for name, of in one["inputs"].items() if name != "labels"}}
        for one in (there, asked)
    ]
    return there != asked and bare[0] == bare[1]


@dataclass(frozen=True)
class _Part:
    """What a site shows of some tables."""

    tables: FeatureTables
    features: list[int]
    """Sorted."""
    labels: Mapping[int, Label]
    """Of these features."""
    similar: Similar | None
    """The most similar features of other tables; None if the site compares none."""


def _parts(
    settings: DashboardSettings, opened: Mapping[str, FeatureTables], similar: Mapping[str, Similar]
) -> dict[str, _Part]:
    """Return what is shown, by its name in the address. Raises SettingsError."""
    if settings.blind and len(opened) > 1:
        raise SettingsError("--blind: pages without numbers are of one dictionary's features; give its tables alone")
    # a site of one has no name, and there its features need none
    chosen = parse_layer_features(settings.feature, {key: one.n_features for key, one in opened.items()})
    parts = {}
    for index, (key, tables) in enumerate(opened.items()):
        features = (
            sorted(feature for at, feature in chosen if at == index) if chosen else list(range(tables.n_features))
        )
        if features:
            there = {} if settings.blind else read_labels(tables.path)
            labels = {one: there[one] for one in features if one in there}
            parts[key] = _Part(tables, features, labels, similar.get(key))
    return parts


def read_result(path: Path) -> DashboardResult:
    """Return what is published at ``path``. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = DashboardManifest.read(path)
    files = manifest.files.values()
    return DashboardResult(path, manifest.n_features, len(files), sum(file.bytes for file in files))


def _write_site(parts: Mapping[str, _Part], settings: DashboardSettings, output: Path, quiet: bool) -> dict[str, JSON]:
    """Write everything that is not there as it was written; return what ``describe_files`` says of all files."""
    tables = {key: part.tables for key, part in parts.items()}
    written = {}
    for folder in ("data", "site"):
        make_directory(output / folder)
    for name, path in site_files().items():
        content = sites.index_page(tables) if name == "index.html" else path.read_bytes()
        written[name] = _write(output, name, content)
    if "" not in parts:
        written[sites.SITES] = _write(output, sites.SITES, sites.sites_file(tables))
    with Progress(0, "dashboard", "files", quiet=quiet) as bar:
        for key, part in parts.items():
            written |= _write_data(part, settings, output, f"data/{key}".rstrip("/"), bar)
    return written


def _write_data(part: _Part, settings: DashboardSettings, output: Path, folder: str, bar: Progress) -> dict[str, JSON]:
    """Write the data of some tables; return what ``describe_files`` says of the files."""
    data = SiteData(part.tables, part.features, settings.window, similar=part.similar)
    make_directory(output / folder)
    names = {name: f"{folder}/{name}.js" for name in data.names()}
    written: dict[str, JSON] = {path: record for path in names.values() if (record := _recall(output, path))}
    missing = {name for name, path in names.items() if path not in written}
    logger.info("writing %d of %d files of pages", len(missing), len(names))
    bar.total = (bar.total or 0) + len(missing)
    for name, content in data.pages(missing):
        _seal(output, names[name], checksum_bytes(content))
        written[names[name]] = _write(output, names[name], content)
        bar.update()
    index = f"{folder}/{INDEX}.js"
    return {**written, index: _write(output, index, data.index(part.labels))}


def _write(output: Path, name: str, content: bytes) -> JSON:
    """Write a file of a site; return what ``describe_files`` says of it if nobody changes it."""
    write_atomically(output / name, content)
    return {"bytes": len(content), "checksum": checksum_bytes(content)}


def _seal(output: Path, name: str, checksum: str) -> None:
    """Vouch for a file of pages until there is a manifest: a killed run continues with files as they were written."""
    path = seal_path(output, name)
    make_directory(path.parent)
    write_atomically(path, checksum.encode())


def _recall(output: Path, name: str) -> JSON | None:
    """Return what ``describe_files`` says of a file that a killed run left; None if it is not as it was written."""
    try:
        record = describe_files(output, [name])[name]
        return record if read_regular(seal_path(output, name)) == record["checksum"].encode() else None
    except (ArtifactError, OSError, ValueError):  # is made again
        return None


def site_files() -> dict[str, Path]:
    """Return the files that are the same in every site, by their names there."""
    paths = sorted([*sites.SITE.iterdir(), COLOURS, *TOOLTIP], key=lambda path: path.name)
    return {"index.html" if path.suffix == ".html" else f"site/{path.name}": path for path in paths}


def _write_blind(parts: Mapping[str, _Part], settings: DashboardSettings, output: Path, quiet: bool) -> list[str]:
    """Write a page per feature in an order of the seed, a list of them, and the key; return the names of all files."""
    (part,) = parts.values()
    tables, order = part.tables, list(part.features)
    random.Random(f"blind dashboard {settings.seed}").shuffle(order)
    names = []
    for item, feature in enumerate(Progress(len(order), "dashboard", "pages", quiet=quiet).of(order), start=1):
        within = range(feature, feature + 1)
        rows, examples = tables.read("features", within), tables.read("examples", within)
        assert rows is not None, "tables always have the table of features"
        names.append(f"item-{item:04d}.html")
        shown = [] if examples is None else examples.to_pylist()
        write_blind_page(output / names[-1], rows.to_pylist()[0], shown, item, window=settings.window)
    key = {f"{item}": feature for item, feature in enumerate(order, start=1)}
    write_atomically(output / "key.json", canonical_json(key))
    write_atomically(output / "index.html", blind_list(names).encode())
    return [*names, "key.json", "index.html"]


def blind_list(names: list[str]) -> str:
    """Return a page of links to the items, in order."""
    style = f"{COLOURS.read_text()}main {{ margin: 24px auto; max-width: 1000px; }}\na {{ color: var(--link); }}\n"
    links = "".join(f'<li><a href="{name}">Item {item}</a></li>\n' for item, name in enumerate(names, start=1))
    return html_document("Items", f"<main>\n<h1>{len(names):,} items</h1>\n<ul>\n{links}</ul>\n</main>", style=style)
