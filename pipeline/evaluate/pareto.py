"""Sparsity against faithfulness, transcoder by transcoder: what published artifacts say, gathered for one picture.

FVU and L0 are the final ones over all held-out rows. CE recovered is that of an evaluation, if one of the transcoder is
given, else that of the language model's last run during training, if there was one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tailrace.analysis.evaluate.recovered import recorded_share
from tailrace.pipeline.artifacts.folders import transcoder_paths
from tailrace.pipeline.artifacts.manifests import EvaluationManifest
from tailrace.pipeline.artifacts.transcoders import PublishedTranscoder, open_transcoders
from tailrace.pipeline.evaluate.settings import Measure
from tailrace.pipeline.evaluate.stage import KIND as EVALUATION
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.runs_table import FINISHED
from tailrace.storage.artifact import MANIFEST, read_sealed
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.formats import TRANSCODER_KINDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One transcoder."""

    name: str
    """The settings that were swept, or the folder's name."""
    group: str
    """Whose line it is on: its architecture, and what else tells it from the others."""
    l0: float
    """Mean number of features active on a held-out row."""
    fvu: float | None
    """Share of the held-out outputs' variance left unexplained; None if they do not vary."""
    ce_recovered: float | None
    """Share of zero ablation's loss recovered; None if it was not measured, or ablation costs nothing."""
    d_sae: int
    site: str
    path: str
    """Where it was found."""
    digest: str
    """The transcoder's."""

    def value(self, measure: Measure) -> float | None:
        """Return the number that stands against L0."""
        return self.fvu if measure == "fvu" else self.ce_recovered


def collect(paths: Sequence[Path]) -> list[Point]:
    """Return a point for every finished transcoder of ``paths``: sweeps, transcoders, and evaluations of these.

    Raises the errors of opening them, all that are missing at once, ArtifactMismatch for other kinds of artifacts and
    for transcoders that were not scored on held-out rows.
    """
    found: dict[str, tuple[str, PublishedTranscoder]] = {}
    recovered: dict[str, float] = {}
    for path, kind in _kinds(paths):
        if kind == EVALUATION:
            recovered |= _recovered(path)
            continue
        for name, folder in _transcoders(path, kind):
            (one,) = open_transcoders(folder)
            found.setdefault(one.manifest.digest, (name, one))
    unscored = [str(one.path) for _, one in found.values() if not one.manifest.metrics.heldout]
    if unscored:
        raise ArtifactMismatch(
            f"{', '.join(unscored)}: trained without held-out rows, so nothing says how good they are; leave them out, "
            "or cache with --holdout and train again"
        )
    for digest in recovered.keys() - found.keys():
        logger.info("an evaluation is of the transcoder %s, which was not given", digest)
    points = [_point(*one, recovered.get(digest)) for digest, one in found.items()]
    return _tell_apart(points, [one for _, one in found.values()])


def _kinds(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    paths = [one for path in paths for one in ([path] if (path / MANIFEST).exists() else transcoder_paths(path))]
    missing = [path for path in paths if not (path / MANIFEST).exists()]
    if missing:
        raise ArtifactMissing(
            "\n".join(
                f"{path}: no published sweep, transcoder or evaluation lies here; check the path" for path in missing
            )
        )
    kinds = [(path, str(read_sealed(path / MANIFEST).get("kind"))) for path in paths]
    wanted = (sweep.KIND, EVALUATION, *TRANSCODER_KINDS)
    if others := [f"{path} ({kind})" for path, kind in kinds if kind not in wanted]:
        raise ArtifactMismatch(f"{', '.join(others)}: wanted sweeps, transcoders or evaluations of them")
    return kinds


def _transcoders(path: Path, kind: str) -> Iterable[tuple[str, Path]]:
    if kind in TRANSCODER_KINDS:
        yield path.resolve().name, path
        return
    for one in sweep.read_result(path).runs:
        if one.status == FINISHED:
            yield one.name, path / one.path
        else:
            logger.warning("%s: run %s diverged and is left out", path, one.name)


def _recovered(path: Path) -> dict[str, float]:
    """Return the CE recovered of each transcoder of an evaluation, by digest, replaced alone."""
    manifest = EvaluationManifest.read(path)
    scores = {score["name"]: recorded_share(score) for score in manifest.scores}
    digests = {site: made_of.digest for site, made_of in (manifest.inputs.transcoders or {}).items()}
    if len(digests) == len(scores) == 1:  # a cross-layer transcoder's score is that of all sites
        digests = dict(zip(scores, digests.values(), strict=True))
    return {digest: share for site, digest in digests.items() if (share := scores.get(site)) is not None}


def _point(name: str, one: PublishedTranscoder, evaluated: float | None) -> Point:
    manifest = one.manifest
    heldout, model = manifest.metrics.heldout, manifest.metrics.model
    return Point(
        name=name,
        group=manifest.architecture.kind,
        l0=float(heldout["l0"]),
        fvu=heldout["fvu"],
        ce_recovered=recorded_share(model) if evaluated is None else evaluated,
        d_sae=manifest.d_sae,
        site=one.name,
        path=str(one.path),
        digest=manifest.digest,
    )


def _tell_apart(points: list[Point], transcoders: list[PublishedTranscoder]) -> list[Point]:
    """Add to the groups' names what their transcoders differ in besides the architecture's kind."""
    facts = [_facts(one) for one in transcoders]
    differing = [index for index in range(3) if len({fact[index] for fact in facts}) > 1]
    return [
        replace(point, group=" ".join([point.group, *(fact[index] for index in differing if fact[index])]))
        for point, fact in zip(points, facts, strict=True)
    ]


def _facts(one: PublishedTranscoder) -> tuple[str, str, str]:
    site = one.layers[0].site
    kind = "cross-layer" if one.is_cross_layer else "SAE" if site.hook_in == site.hook_out else "transcoder"
    return "with skip" if one.manifest.architecture.skip else "", kind, f"at {one.name}"


def lines(points: Sequence[Point], measure: Measure) -> dict[str, list[Point]]:
    """Return the points that were measured, by group, by rising L0. Raises SettingsError if there are none."""
    measured = [point for point in points if point.value(measure) is not None]
    if not measured:
        advice = (
            "run `pipeline evaluate`, and give its directory beside those of the transcoders or their sweep; where "
            "ablating the site costs no cross entropy, there is none to recover"
            if measure == "ce_recovered"
            else "train on a cache whose held-out outputs vary"
        )
        raise SettingsError(f"--y {measure}: measured for none of {len(points)} transcoders; {advice}")
    groups: dict[str, list[Point]] = {}
    for point in sorted(measured, key=lambda point: (point.l0, point.value(measure), point.name)):
        groups.setdefault(point.group, []).append(point)
    return dict(sorted(groups.items()))


def front(points: Sequence[Point], measure: Measure) -> list[Point]:
    """Return the points that no other beats: none is at most as dense and as good or better. By rising L0."""
    best: list[Point] = []
    sign = 1 if measure == "fvu" else -1

    def cost(point: Point) -> float:
        value = point.value(measure)
        assert value is not None, "only measured points are compared"
        return sign * value

    for point in sorted(points, key=lambda point: (point.l0, cost(point))):
        if not best or cost(point) < cost(best[-1]):
            best.append(point)
    return best


def as_json(points: Sequence[Point], measure: Measure) -> list[dict[str, Any]]:
    """Return every point, with whether it is on its group's front; null where it was not measured."""
    on_front = {
        point.digest
        for group in {point.group for point in points}
        for point in front([p for p in points if p.group == group and p.value(measure) is not None], measure)
    }
    return [
        {**asdict(point), "on_front": None if point.value(measure) is None else point.digest in on_front}
        for point in points
    ]
