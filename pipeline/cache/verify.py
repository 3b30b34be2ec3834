"""The stage ``pipeline verify``: is every byte as written, do pairs belong together, is the order a true shuffle?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import numpy as np
import torch

from tailrace.pipeline.cache.recorded_model import RecordedModel, open_recorded_model
from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.model.language_model import PairingCheck
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.progress import Progress
from tailrace.storage.activation_cache import CacheSplit, open_cache
from tailrace.storage.artifact import MANIFEST, REQUEST, read_sealed, unreadable, verify_artifact
from tailrace.storage.cache_format import KIND, Site
from tailrace.storage.cache_verify import total_bytes, verify_bytes
from tailrace.storage.compared import Sample
from tailrace.storage.display import card, line, share, table
from tailrace.storage.draft import holds_artifact
from tailrace.storage.errors import ActionableError, ArtifactCorrupt, ArtifactMissing
from tailrace.storage.generations import CacheAt, CachePath, refuse_generation
from tailrace.storage.layout import RELATIVE_ERROR, Side, relative_error
from tailrace.storage.names import refuse_lost
from tailrace.storage.shuffle import philox
from tailrace.storage.shuffle_evidence import ShuffleEvidence, shuffle_evidence
from tailrace.storage.statistics import as_float32

MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-7}
"""Relative error allowed between two runs of the model, on top of what storing rounds: sums come out in another order
with other threads, libraries or devices, and a network amplifies that. Same machine and threads give 0."""


@dataclass(frozen=True)
class PairingReport:
    """How stored rows compare with the model run again over their contexts."""

    split: str
    site: str
    side: Side
    n_rows: int
    relative_error: float
    """‖stored − computed‖ / ‖computed‖ over all rows checked; 0 if both are zero."""
    tolerance: float
    mlp_relative_error: float | None
    """‖MLP(stored input) − stored output‖ / ‖stored output‖, on the output of a layer's own MLP; None elsewhere."""
    is_mlp: bool
    """Whether the site is a layer's own MLP and its weights are raw; elsewhere that check is not applicable."""

    @property
    def passed(self) -> bool:
        """Whether the error is within what the dtypes explain."""
        return self.relative_error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """What was checked of an artifact, and what was wrong."""

    path: Path
    kind: str = ""
    """The artifact's kind; empty for a folder of artifacts."""
    damage: list[str] = field(default_factory=list)
    """A sentence for every file that is not as it was written."""
    pairs: list[PairingReport] = field(default_factory=list)
    """Of a cache, for every split, site and side."""
    shuffle: ShuffleEvidence | None = None
    """Of a cache, if it was asked for."""
    inside: list[Verification] = field(default_factory=list)
    """Of a folder, its artifacts."""
    unfinished: list[Path] = field(default_factory=list)
    """Of a folder, artifacts in it that were begun and not finished; they are not checked."""
    sampled: str = ""
    """Of a sample, how much was read."""

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing was wrong."""
        is_shuffled = self.shuffle is None or self.shuffle.passed
        are_right = all(report.passed for report in self.pairs) and all(one.passed for one in self.inside)
        return bool(self.kind or self.inside) and not self.damage and are_right and is_shuffled

    def _repr_html_(self) -> str:
        columns = ("split", "site", "side", "rows", "relative error", "at most", "")
        compared = [
            (one.split, one.site, one.side, one.n_rows, one.relative_error, one.tolerance, "✓" if one.passed else "✗")
            for one in self.pairs
        ]
        parts = [*(line(escape(problem)) for problem in self.damage), table(columns, compared) if compared else ""]
        return card("Checked: passed" if self.passed else "Checked: DAMAGED", {}, *parts, note=self.path)


def kind_of(path: Path) -> str:
    """Return the kind of the artifact at ``path``; of an unfinished one, a cache's or ``artifact``."""
    if (path / MANIFEST).exists():
        return str(read_sealed(path / MANIFEST).get("kind"))
    return KIND if (path / "commits").is_dir() else "artifact"


def holds_others(path: Path) -> bool:
    """Return whether ``path`` is a folder of artifacts and none itself."""
    is_one = any((path / name).exists() for name in (MANIFEST, REQUEST))
    return path.is_dir() and not is_one and next(_artifacts(path), None) is not None


def _artifacts(path: Path) -> Iterator[Path | ArtifactCorrupt]:
    """Yield the folders of artifacts below ``path``, damaged ones too; an error for each that cannot be read.

    What lies in a finished artifact is part of it.
    """
    try:
        if (path / REQUEST).is_file() or holds_artifact(path):
            yield path
            if (path / MANIFEST).is_file():
                return
    except OSError as error:
        yield unreadable(error, path)
        return
    yield from _below(path)


def _below(path: Path) -> Iterator[Path | ArtifactCorrupt]:
    try:
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        yield unreadable(error, path)
        return
    for name in folders:
        if not name.startswith("."):
            yield from _artifacts(path / name)


def run(
    path: Path,
    *,
    checksums: bool = True,
    pairs: int = 8,
    shuffle: bool = False,
    batch_rows: int | None = None,
    epoch: int = 0,
    generation: int | None = None,
    model: str | None = None,
    sample: float = 1.0,
    seed: int = 0,
    compute: Compute = Compute(),
    finished: Callable[[Verification], object] = lambda _: None,
) -> Verification:
    """Check the artifact at ``path``: bytes; of a cache also ``pairs`` contexts, and the order with ``shuffle``.

    Of a folder of artifacts, the bytes of each; bytes are those of all generations of a cache, the rest is of
    ``generation``, by default the newest. Of the files that manifests and commit records list, the share ``sample`` is
    read, drawn by ``seed``. Where one check finds something wrong, the next are left out. ``finished`` is
    given what each check of a cache alone, or of an artifact in a folder, has shown. The other arguments are those of
    ``check_pairs`` and ``check_shuffle``, and so are the errors.
    """
    drawn, read = Sample(sample, seed), path if generation is None else CacheAt(path, generation)
    is_folder = holds_others(path)
    if not (is_folder or any((path / name).exists() for name in (MANIFEST, REQUEST))):
        raise ArtifactMissing.at(path)
    kind = _kind_if_known(path)
    if is_folder or kind != KIND:
        refuse_generation(path, generation)
    if is_folder:
        done = _check_folder(path, drawn, finished, quiet=compute.quiet)
    elif kind != KIND:
        done = Verification(path, *_damage_of(path, drawn, quiet=compute.quiet))
        finished(done)
    else:
        done = Verification(path, KIND)
        if checksums:
            done = replace(done, damage=check_bytes(path, quiet=compute.quiet, sample=drawn))
            finished(done)
        if pairs and done.passed:
            done = replace(done, pairs=check_pairs(read, n_contexts=pairs, model=model, compute=compute))
            finished(replace(done, damage=[]))
        if shuffle and done.passed:
            done = replace(done, shuffle=check_shuffle(read, batch_rows=batch_rows, epoch=epoch))
            finished(replace(done, damage=[], pairs=[]))
    return replace(done, sampled=_sentence(drawn)) if sample < 1 else done


def _kind_if_known(path: Path) -> str:
    """Return the kind of an artifact; with a damaged manifest a cache is known by its folders, another is any."""
    try:
        return kind_of(path)
    except ArtifactCorrupt:
        return KIND if (path / "commits").is_dir() else "artifact"


def _damage_of(path: Path, sample: Sample, *, quiet: bool) -> tuple[str, list[str]]:
    """Return the kind of an artifact, and what is wrong with it: if its manifest is damaged, also with those inside."""
    if (kind := _kind_if_known(path)) == KIND:
        return kind, check_bytes(path, quiet=quiet, sample=sample)
    try:
        kind_of(path)
    except ArtifactCorrupt as error:
        inside = _check_folder(path, sample, lambda _: None, quiet=quiet, below=True)
        return kind, [str(error), *inside.damage, *(problem for one in inside.inside for problem in one.damage)]
    return kind, verify_artifact(path, kind, sample.reads)


def _check_folder(
    path: Path, sample: Sample, finished: Callable[[Verification], object], *, quiet: bool, below: bool = False
) -> Verification:
    """Check the artifacts at ``path`` and below it, or only those ``below``."""
    done = Verification(path)
    for artifact in _below(path) if below else _artifacts(path):
        kind = ""
        if isinstance(artifact, ArtifactCorrupt):
            done.damage.append(str(artifact))
            continue
        try:
            refuse_lost(artifact / MANIFEST)
            if not (artifact / MANIFEST).exists():
                done.unfinished.append(artifact)
                continue
            kind, damage = _damage_of(artifact, sample, quiet=quiet)
        except ActionableError as error:  # the others are checked all the same
            damage = [str(error)]
        except OSError as error:
            damage = [str(unreadable(error, artifact))]
        done.inside.append(Verification(artifact, kind, damage))
        finished(done.inside[-1])
    return done


def _sentence(sample: Sample) -> str:
    """Return how much was read, and what that is worth."""
    files, size = share(sample.n_read / max(1, sample.n_files)), share(sample.n_bytes_read / max(1, sample.n_bytes))
    return (
        f"read {sample.n_read:,} of {sample.n_files:,} files ({files}), {size} of their bytes, drawn by seed "
        f"{sample.seed}; of the others the sizes were compared. One damaged file of the same size is found with a "
        f"chance of {files}; {sample.n_seeds} seeds in a row, such as 0 to {sample.n_seeds - 1}, read every file"
    )


def check_bytes(path: Path, *, quiet: bool = True, sample: Sample | None = None) -> list[str]:
    """Re-read every checksum of a cache, or of a sample; return a sentence for every difference."""
    with Progress(None, "checksums", "bytes", quiet=quiet) as bar:

        def note(n_bytes: int) -> None:
            bar.update(n_bytes)

        # the damage is what verify_bytes reports
        with suppress(ActionableError, OSError, KeyError), open_cache(path) as cache:
            bar.total = total_bytes(cache)
        return verify_bytes(path, note, (sample or Sample(1.0)).reads)


def check_pairs(
    path: CachePath,
    *,
    n_contexts: int = 16,
    model: str | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
) -> list[PairingReport]:
    """Run the model again over random recorded contexts and compare with their stored rows.

    ``model`` says where the model lies if it moved. Raises ArtifactMismatch if it is not the recorded one.
    """
    with open_cache(path) as cache, compute.opened():
        checker = _PairChecker(open_recorded_model(cache, model=model, device=compute.device_name))
        reports = []
        for name in cache.manifest.splits:
            split = cache.split(name)
            generator = np.random.Generator(philox(seed, f"verify/{name}"))
            used = _used_contexts(split)
            chosen = np.sort(generator.choice(used, min(n_contexts, used), replace=False))
            reports += checker.check(split, chosen)
    return reports


def _used_contexts(split: CacheSplit) -> int:
    """Return how many contexts, from the first on, have all their rows stored or are the last to have some."""
    last = split.read_unit(split.n_units - 1, ["context"])["context"]
    return int(last.max()) + 1


class _PairChecker:
    def __init__(self, recorded: RecordedModel) -> None:
        self.cache, self.model, self.grid = recorded.cache, recorded.model, recorded.contexts_per_batch
        sites = [replace(site, dtype="float32") for site in self.cache.sites.values()]
        self.maker = RowMaker(self.model, sites, recorded.row_mask, self.grid)

    def check(self, split: CacheSplit, contexts: np.ndarray) -> list[PairingReport]:
        stored = _stored_rows(split, contexts)
        computed = self._computed_rows(split, stored)
        reports = []
        for site in self.cache.sites.values():
            pairing = self._compare_pair(site, stored)
            reports += [self._report(split.name, site, side, stored, computed, pairing) for side in site.sides]
        return reports

    def _computed_rows(self, split: CacheSplit, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return float32 activations of the stored rows' positions, each context run in its own grid batch."""
        wanted = _code(stored["context"], stored["position"])
        pieces: dict[str, list[np.ndarray]] = {}
        for batch in np.unique(stored["context"] // self.grid).tolist():
            grid = np.arange(batch * self.grid, min((batch + 1) * self.grid, split.n_contexts))
            rows = self.maker.rows(split.context_tokens(grid), split.marked_documents(grid), batch * self.grid)
            chosen = np.isin(_code(rows.provenance["context"], rows.provenance["position"]), wanted)
            for key, values in rows.arrays().items():
                pieces.setdefault(key, []).append(values[chosen])
        return {key: np.concatenate(rows) for key, rows in pieces.items()}

    def _report(
        self,
        split: str,
        site: Site,
        side: Side,
        stored: dict[str, np.ndarray],
        computed: dict[str, np.ndarray],
        pairing: PairingCheck,
    ) -> PairingReport:
        key = f"{site.name}/{side}"
        kept, again = as_float32(stored[key]).astype(np.float64), computed[key].astype(np.float64)
        error = relative_error(float(np.linalg.norm(kept - again)), float(np.linalg.norm(again)))
        tolerance = RELATIVE_ERROR[site.dtype] + MODEL_TOLERANCE[self.model.dtype]
        mlp_error = pairing.relative_error if pairing.applicable and side == "out" else None
        return PairingReport(split, site.name, side, len(kept), error, tolerance, mlp_error, pairing.applicable)

    def _compare_pair(self, site: Site, stored: dict[str, np.ndarray]) -> PairingCheck:
        sides = (
            torch.from_numpy(as_float32(stored[f"{site.name}/{side}"])) for side in (site.sides[0], site.sides[-1])
        )
        return self.model.compare_pair(SiteHooks.of(site), *sides)


def _stored_rows(split: CacheSplit, contexts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the stored rows of some contexts, in token order; reads only the units that hold them."""
    keys = [*split.layout.encodings(), "context", "position"]
    starts = np.asarray(split.first_contexts())
    pieces: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for unit in range(split.n_units):
        end = starts[unit + 1] if unit + 1 < split.n_units else np.iinfo(np.int64).max
        if not ((contexts >= starts[unit]) & (contexts <= end)).any():
            continue
        rows = split.read_unit(unit, keys)
        wanted = np.isin(rows["context"], contexts)
        for key in keys:
            pieces[key].append(rows[key][wanted])
    joined = {key: np.concatenate(rows) for key, rows in pieces.items()}
    return {**joined, **{key: joined[key].astype(np.int64) for key in ("context", "position")}}


def check_shuffle(
    path: CachePath, *, batch_rows: int | None = None, epoch: int = 0, seed: int | None = None
) -> ShuffleEvidence:
    """Report whether the order in which training rows are served looks like a uniformly random permutation.

    Reads provenance only. Batches are of 4096 rows, fewer where that would not make 16 of them. Raises SettingsError
    if there are too few rows for a report.
    """
    with open_cache(path) as cache:
        split = cache.split("train")
        batch_rows = batch_rows or max(1, min(4096, split.n_rows // 16))
        token_order = _token_order(split)
        served: dict[str, list[np.ndarray]] = {"context": [], "position": [], "document": []}
        with split.stream(list(served), batch_rows=batch_rows, epoch=epoch, seed=seed, n_epochs=epoch + 1) as stream:
            for batch in stream:
                for name, values in served.items():
                    values.append(batch.arrays[name].copy())
        rows = {name: np.concatenate(values) for name, values in served.items()}
        index = token_order.index_of(rows["context"], rows["position"])
        return shuffle_evidence(
            index, rows["document"], batch_rows=batch_rows, seed=cache.seed if seed is None else seed
        )


@dataclass(frozen=True)
class _TokenOrder:
    """Every row's (context, position) code in token order."""

    codes: np.ndarray

    def index_of(self, context: np.ndarray, position: np.ndarray) -> np.ndarray:
        return np.asarray(np.searchsorted(self.codes, _code(context, position)))


def _token_order(split: CacheSplit) -> _TokenOrder:
    codes = []
    for unit in range(split.n_units):
        rows = split.read_unit(unit, ["context", "position"])
        codes.append(_code(rows["context"], rows["position"]))
    return _TokenOrder(np.concatenate(codes))


def _code(context: np.ndarray, position: np.ndarray) -> np.ndarray:
    return np.asarray(context.astype(np.int64) * 65536 + position)
