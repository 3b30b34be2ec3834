"""delphi's latents: per module, safetensors of where which latents fire, split by range of latents, and the tokens.

Written below ``latents/``, which is what its reader is given: it takes every entry there for a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tailrace.pipeline.formats.conversion import write_json
from tailrace.pipeline.formats.hooks import module_of
from tailrace.storage.activation_cache import CacheSplit, open_cache
from tailrace.storage.artifact import make_directory
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.generations import CacheAt, CachePath
from tailrace.storage.names import folder_problem, matching
from tailrace.storage.tables import TablesManifest, read_table
from tailrace.training.architectures.transcoder import write_tensors

FOLDER, CONFIG = "latents", "config.json"
NOTE_ON_RELEASES = "written for the reader of delphi (eai-delphi) 0.1.3"
_LARGEST_HALF = float(np.finfo(np.float16).max)
_PARTITION = re.compile(r"features-(\d+)-(\d+)\.parquet")


@dataclass(frozen=True)
class LatentTables:
    """Published tables with their activations, and the contexts they were made from."""

    path: Path
    manifest: TablesManifest
    split: CacheSplit

    def module(self, named: str | None) -> str:
        """Name of the folder: the module whose activations these are, else the site's name."""
        site = self.manifest.site
        return named or module_of(site, self.manifest.model) or site.name

    @property
    def partitions(self) -> list[Path]:
        """Files of activations, by their first feature."""
        return [one for one in matching(self.path / "activations", "*.parquet") if _PARTITION.fullmatch(one.name)]


def open_tables(paths: Sequence[Path], cache: CachePath | None, module: str | None) -> list[LatentTables]:
    """Open tables with the cache they were made from, whose tokens delphi reads beside the activations.

    Raises SettingsError without a cache or for modules of one name, ArtifactMismatch if the cache is another one,
    ArtifactMissing for tables without activations; all problems of a kind at once.
    """
    if not paths:
        raise SettingsError("nothing to export; give the path of at least one artifact of tables")
    if cache is None:
        raise SettingsError("delphi reads whole contexts, and tables hold rows; give the cache they come from, --cache")
    manifests = {path: TablesManifest.read(path) for path in paths}
    if missing := [str(path) for path in paths if not (path / "activations").is_dir()]:
        raise ArtifactMissing(
            f"{', '.join(missing)}: hold no activations; run pipeline analyze again with --activations all"
        )
    problems, found = [], []
    home = cache.path if isinstance(cache, CacheAt) else cache  # each of the tables knows its own generation
    for path, manifest in manifests.items():
        recorded = manifest.inputs.cache
        if recorded is None:
            problems.append(f"{path}: was made from fresh text (--live), and delphi reads a cache; analyze a cache")
            continue
        opened = open_cache(home, recorded.generation)
        if differences := list_differences(opened.reference, recorded.as_json()):
            problems.append(f"{home}: is not the cache that {path} was made from: {'; '.join(differences)}")
        else:
            split = opened.split(manifest.settings["split"])
            found.append(LatentTables(path, manifest, split))
    if problems:
        raise ArtifactMismatch("\n".join(problems))
    modules = [one.module(module) for one in found]
    if wrong := [f"{name!r} {problem}" for name in modules if (problem := folder_problem(name)) is not None]:
        raise SettingsError(f"{'; '.join(wrong)}, and names a folder; give one such as layers.3.mlp with --module")
    if repeated := sorted({name for name in modules if modules.count(name) > 1}):
        raise SettingsError(f"{', '.join(repeated)}: more than one of the tables belongs there; export one at a time")
    return found


def write(directory: Path, tables: LatentTables, module: str | None, model_name: str) -> tuple[list[str], list[str]]:
    """Write the latents of one module; return the names of the files, and notes.

    Contexts are numbered from 0 in the order of their ids, those alone all of whose rows are in the tables.
    """
    named = tables.module(module)
    folder = directory / FOLDER / named
    make_directory(folder)
    rows = read_table(tables.path / "rows.parquet", ["context", "position"])
    context, position = (rows[name].to_numpy().astype(np.int64) for name in ("context", "position"))
    if len(context) < tables.split.n_rows:
        # Activations were kept of the first rows alone: in the context they end in, later ones look as if none fired.
        context = context[context < context[-1]]
    contexts, number = np.unique(context, return_inverse=True)
    tokens = torch.from_numpy(tables.split.context_tokens(contexts))
    files, wide = [], 0
    for first, last, feature, row, activation in _partitions(tables, len(context)):
        locations = np.stack([number[row], position[row], feature - first], axis=1)
        values = torch.from_numpy(activation)
        if bool((values > _LARGEST_HALF).any()):
            wide += 1
        else:
            values = values.half()
        name = f"{first}_{last}.safetensors"
        write_tensors(folder / name, {"locations": _narrow(locations), "activations": values, "tokens": tokens})
        files.append(f"{FOLDER}/{named}/{name}")
    text = tables.split.cache.manifest.text
    write_json(
        folder / CONFIG,
        {
            "dataset_repo": str(text.get("dataset", "")),
            "dataset_split": tables.split.name,
            "dataset_name": "",
            "dataset_column": "",
            "batch_size": 1,
            "cache_ctx_len": tables.split.layout.context_length,
            "n_tokens": int(tokens.numel()),
            "n_splits": len(files),
            "model_name": model_name,
        },
    )
    notes = [f"{named}: {wide} files keep activations in float32, which float16 cannot hold"] if wide else []
    return [f"{FOLDER}/{named}/{CONFIG}", *files], notes


def _partitions(
    tables: LatentTables, n_rows: int
) -> Iterator[tuple[int, int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (first feature, last feature, feature, row, activation) of every file, on the first ``n_rows`` rows."""
    for path in tables.partitions:
        match = _PARTITION.fullmatch(path.name)
        assert match is not None
        table = read_table(path, ["feature", "row", "activation"])
        row = table["row"].to_numpy().astype(np.int64)
        is_kept = row < n_rows
        feature = table["feature"].to_numpy().astype(np.int64)[is_kept]
        activation = table["activation"].to_numpy().astype(np.float32)[is_kept]
        yield int(match[1]), int(match[2]), feature, row[is_kept], activation


def _narrow(locations: NDArray[np.int64]) -> torch.Tensor:
    """Return locations in the narrowest unsigned type that delphi reads."""
    largest = int(locations.max(initial=0))
    return torch.from_numpy(locations.astype(np.uint16 if largest < 1 << 16 else np.uint32))
