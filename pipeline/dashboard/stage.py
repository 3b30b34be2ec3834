"""The stage ``pipeline dashboard``: published tables in, a static site of feature pages out.

Needs neither the language model nor the transcoder, and no torch: everything shown is in the tables.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.artifacts.folders import artifacts_inside
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.dashboard.blind import write_blind_page
from tailrace.pipeline.dashboard.feature_selection import parse_features, parse_layer_features
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import INDEX, SiteData
from tailrace.pipeline.shared.pages import COLOURS, TOOLTIP
from tailrace.pipeline.shared.stage import Made, publish_stage
from tailrace.storage.artifact import (
    MANIFEST,
    REQUEST,
    canonical_json,
    make_directory,
    write_atomically,
)
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.formats import TABLES_KIND

KIND = DashboardManifest.of_kind
SITE = Path(__file__).parent / "site"
"""The site's own page, styles and scripts."""

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


def run(settings: DashboardSettings, *, tables: Path, output: Path, quiet: bool = False) -> DashboardResult:
    """Publish the site of ``tables`` at ``output``; return at once if it is there already.

    A run that was interrupted continues with the pages that are missing. Raises ArtifactMissing, ArtifactIncomplete or
    ArtifactMismatch for what is no tables artifact or another site at ``output``, SettingsError for features that do
    not exist, StorageFull.
    """
    opened = FeatureTables(tables)
    features = sorted(parse_features(settings.feature, opened.n_features)) or list(range(opened.n_features))
    inputs = {"tables": {"digest": opened.manifest.digest}}

    def make(path: Path) -> Made:
        write = _write_blind if settings.blind else _write_site
        files = write(opened, features, settings, path, quiet)
        of = {"model": opened.manifest.model, "site": opened.manifest.site.as_json()}
        return Made({**of, "n_features": len(features)}, files, ("tailrace", "pyarrow"))

    publish_stage(output, KIND, {"settings": settings.model_dump(mode="json"), "inputs": inputs}, make)
    return read_result(output)


def run_each(
    settings: DashboardSettings, *, tables: Path, output: Path, quiet: bool = False
) -> Iterator[DashboardResult]:
    """Publish the site of ``tables``; of a folder of tables, a site for each at ``output/<its name>``.

    Features of several are chosen as ``layer8:89``, and those of which none is chosen get no site. The errors are those
    of ``run``, and ArtifactMismatch if something else lies at ``output``.
    """
    inside = artifacts_inside(tables, TABLES_KIND)
    if not inside:
        yield run(settings, tables=tables, output=output, quiet=quiet)
        return
    if (output / REQUEST).exists() or (output / MANIFEST).exists():
        raise ArtifactMismatch(
            f"{output}: holds an artifact already; of a folder of tables, --out is a folder that gets a site for each. "
            "Choose another"
        )
    chosen = parse_layer_features(settings.feature, {one.name: FeatureTables(one).n_features for one in inside})
    for index, one in enumerate(inside):
        own = tuple(str(feature) for layer, feature in chosen if layer == index)
        if own or not chosen:
            part = settings.model_copy(update={"feature": own})
            yield run(part, tables=one, output=output / one.name, quiet=quiet)


def read_result(path: Path) -> DashboardResult:
    """Return what is published at ``path``. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = DashboardManifest.read(path)
    files = manifest.files.values()
    return DashboardResult(path, manifest.n_features, len(files), sum(file.bytes for file in files))


def _write_site(
    tables: FeatureTables, features: list[int], settings: DashboardSettings, output: Path, quiet: bool
) -> list[str]:
    """Write everything that is not there yet; return the names of all files."""
    data = SiteData(tables, features, settings.window)
    names = [f"data/{name}.js" for name in data.names()]
    for folder in ("data", "site"):
        make_directory(output / folder)
    own = _write_own_files(output)
    missing = {Path(name).stem for name in names if not (output / name).exists()}
    logger.info("writing %d of %d files of pages", len(missing), len(names))
    with tqdm(total=len(missing), desc="dashboard", unit="file", disable=quiet or None) as bar:
        for name, content in data.pages(missing):
            write_atomically(output / "data" / f"{name}.js", content)
            bar.update()
    write_atomically(output / "data" / f"{INDEX}.js", data.index())
    return [*own, *names, f"data/{INDEX}.js"]


def _write_own_files(output: Path) -> list[str]:
    """Copy the site's page, styles and scripts; return their names."""
    for name, path in site_files().items():
        write_atomically(output / name, path.read_bytes())
    return list(site_files())


def site_files() -> dict[str, Path]:
    """Return the files that are the same in every site, by their names there."""
    paths = sorted([*SITE.iterdir(), COLOURS, TOOLTIP], key=lambda path: path.name)
    return {"index.html" if path.suffix == ".html" else f"site/{path.name}": path for path in paths}


def _write_blind(
    tables: FeatureTables, features: list[int], settings: DashboardSettings, output: Path, quiet: bool
) -> list[str]:
    """Write a page per feature in an order of the seed, a list of them, and the key; return the names of all files."""
    order = list(features)
    random.Random(f"blind dashboard {settings.seed}").shuffle(order)
    names = []
    for item, feature in enumerate(tqdm(order, desc="dashboard", unit="page", disable=quiet or None), start=1):
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
    style = COLOURS.read_text()
    links = "".join(f'<li><a href="{name}">Item {item}</a></li>\n' for item, name in enumerate(names, start=1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Items</title>\n'
        '<link rel="icon" href="data:,">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}main {{ margin: 24px auto; max-width: 1000px; }}\na {{ color: var(--link); }}\n</style>\n"
        f"</head>\n<body>\n<main>\n<h1>{len(names):,} items</h1>\n<ul>\n{links}</ul>\n</main>\n</body>\n</html>\n"
    )
