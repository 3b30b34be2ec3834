"""Training and publishing transcoders that share one reading of their rows; a transcoder alone is the case of one.

Each run has a draft of its own, and ends as the artifact it would be if it had been trained alone, byte for byte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tailrace.pipeline.train.model_scores import ModelScores
from tailrace.pipeline.train.sources import TrainingRows, TrainingSource, choose_site
from tailrace.pipeline.train.warm_start import WarmStart
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import NonFiniteActivation, SettingsError
from tailrace.training.architectures.transcoder import CHECKPOINTS, FORMAT_VERSION, describe_versions
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.distributed import Group, RankBatches
from tailrace.training.loop.loggers import Logger
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.session import Session
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.sweep import Member, follow_first, train_together
from tailrace.training.loop.trainer import PeriodicHook
from tailrace.training.rows.ordinary_rows import massive_warning

logger = logging.getLogger(__name__)

GiveUp = Callable[["OpenRun", NonFiniteActivation], None]
"""Told of a run that left the others."""


@dataclass(frozen=True)
class Origins:
    """What the runs of one command have in common, besides their rows."""

    device: torch.device
    scores: ModelScores
    start: WarmStart | None = None
    hooks: Sequence[tuple[int, PeriodicHook]] = ()
    """(every so many steps, hook) of the caller."""
    loggers: Callable[[], list[Logger]] = list
    """Makes the loggers of one run."""
    group: Group | None = None
    """The processes that train one run together, if there are several."""

    def request(self, settings: TrainSettings, source: TrainingSource) -> dict[str, Any]:
        """Return what decides a transcoder: settings with their choices made, rows, and first weights if not random."""
        chosen = source.decided(settings).model_copy(update={"precision": self.precision(settings)})
        start = {} if self.start is None else self.start.request
        return {"settings": chosen.model_dump(mode="json"), **source.request, **start, **self.scores.request}

    def precision(self, settings: TrainSettings) -> Any:
        """Return the precision that the settings mean on this device."""
        return resolve_precision(settings.precision, self.device)

    def site(self, settings: TrainSettings, source: TrainingSource) -> Site:
        """Return the site to train on.

        Raises SettingsError listing every setting that fits neither the rows nor the weights to start from.
        """
        site = choose_site(settings, source)
        if self.start is not None and (problems := self.start.problems(settings, site)):
            raise SettingsError(
                f"{self.start.path}: cannot be started from, a transcoder of another shape; use its settings:\n"
                + "\n".join(f"  {line}" for line in problems)
            )
        return site


@dataclass
class OpenRun:
    """A draft that is being trained."""

    name: str
    settings: TrainSettings
    site: Site
    draft: Draft
    run: TrainingRun
    session: Session

    @property
    def path(self) -> Path:
        """The draft's directory."""
        return self.draft.path


def train_drafts(
    source: TrainingSource,
    drafts: Mapping[str, tuple[TrainSettings, Site, Draft]],
    origins: Origins,
    *,
    place: Path,
    checkpoint_steps: int,
    quiet: bool,
    give_up: GiveUp | None = None,
) -> None:
    """Train the unpublished drafts, by name, from where they were left, and publish each when it is done.

    All have the same ``batch_rows`` and ``order_seed``. ``place`` is the artifact they belong to. With ``give_up``, a
    run that stops being finite leaves the others to go on.
    """
    sites = {site.name: site for _, site, _ in drafts.values()}
    alone = len(drafts) == 1 and give_up is None
    with ExitStack() as stack:
        rows: TrainingRows = stack.enter_context(source.open(list(sites.values()), place))
        opened = []
        for name, (settings, site, draft) in drafts.items():
            one = _open_run(name, settings, site, draft, rows, origins, checkpoint_steps, quiet or not alone)
            stack.enter_context(one.session)
            opened.append(one)
        members = [_member(one, source, origins, give_up) for one in opened]
        stream, group = rows.stream, origins.group
        ready = None
        if group is not None:
            (one,) = opened
            stream = RankBatches(stream, group.rank, group.size)
            ready = partial(follow_first, group, one.run, stream)
        n_steps = max((one.session.n_steps for one in opened), default=0)
        bar = stack.enter_context(_SharedBar(n_steps, hidden=quiet or alone))
        train_together(stream, members, checkpoint_steps=checkpoint_steps, watch=bar, ready=ready)


class _SharedBar:
    """One bar for all runs, as long as the longest; a run alone shows its own."""

    def __init__(self, n_steps: int, *, hidden: bool) -> None:
        self._bar = tqdm(total=n_steps, unit="step", desc="sweep", disable=True if hidden else None)

    def __call__(self, step: int) -> None:
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)

    def __enter__(self) -> _SharedBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _open_run(
    name: str,
    settings: TrainSettings,
    site: Site,
    draft: Draft,
    rows: TrainingRows,
    origins: Origins,
    checkpoint_steps: int,
    quiet: bool,
) -> OpenRun:
    n_steps = rows.n_steps(settings)
    massive = massive_warning(site.name, rows.statistics(site)[site.sides[-1]], settings.max_norm_multiple)
    for sentence in [*settings.without_effect(n_steps), *([] if massive is None else [massive])]:
        logger.warning("%s: %s", draft.path, sentence)
    run = _build(name, settings, site, rows, origins)
    session = Session(
        draft.path,
        run,
        settings,
        n_steps=n_steps,
        heldout=rows.heldout(site),
        checkpoint_steps=checkpoint_steps,
        hooks=[*origins.scores.hooks(site), *origins.hooks],
        loggers=origins.loggers(),
        quiet=quiet,
    )
    return OpenRun(name, settings, site, draft, run, session)


def _build(name: str, settings: TrainSettings, site: Site, rows: TrainingRows, origins: Origins) -> TrainingRun:
    run = build_run(
        settings,
        site,
        rows.statistics(site),
        n_steps=rows.n_steps(settings),
        device=origins.device,
        precision=origins.precision(settings),
        name=name,
        row_source=rows.fresh_rows(site, settings.seed),
        row_scorer=origins.scores.row_scorer(settings, site),
        group=origins.group,
    )
    if origins.start is not None:
        origins.start.apply(run)
    return run


def train_beside(source: TrainingSource, settings: TrainSettings, origins: Origins, *, place: Path) -> None:
    """Take the steps of a run whose files the first process of the group writes; nothing is written here."""
    assert origins.group is not None, "only a process of a group trains beside another"
    site = origins.site(settings, source)
    with ExitStack() as stack:
        rows: TrainingRows = stack.enter_context(source.open([site], place))
        run = _build("transcoder", settings, site, rows, origins)
        stream = RankBatches(rows.stream, origins.group.rank, origins.group.size)
        follow_first(origins.group, run, stream)
        for _ in range(run.n_steps_done, rows.n_steps(settings)):
            run.step(stream.next_batch())


def _member(one: OpenRun, source: TrainingSource, origins: Origins, give_up: GiveUp | None) -> Member:
    scored_every = [one.settings.evaluate_every, *(n for n, _ in origins.scores.hooks(one.site))]
    return Member(
        one.run,
        one.session,
        Checkpoints(one.path / CHECKPOINTS),
        scored_every,
        finish=lambda: _publish(one, source, origins),
        give_up=None if give_up is None else lambda error: give_up(one, error),
    )


def _publish(one: OpenRun, source: TrainingSource, origins: Origins) -> None:
    files = one.session.export()
    one.draft.publish(_describe(one, source, origins), files)
    Checkpoints(one.path / CHECKPOINTS).discard_after(-1)
    logger.info("%s: published after %d steps", one.path, one.run.n_steps_done)


def _describe(one: OpenRun, source: TrainingSource, origins: Origins) -> dict[str, Any]:
    """Return the manifest of a trained transcoder."""
    described = source.description()
    if origins.start is not None:
        described["inputs"] = {**described["inputs"], "transcoder": origins.start.request["from"]}
    return {
        "format": FORMAT_VERSION,
        **described,
        "site": asdict(one.site),
        "d_sae": one.run.transcoder.d_sae,
        "architecture": one.settings.architecture.model_dump(mode="json"),
        "normalisation": {
            "kind": one.settings.normalisation,
            "scale_in": one.run.normalisation.scale_in,
            "scale_out": one.run.normalisation.scale_out,
        },
        "learnt_from": None if one.run.ordinary is None else asdict(one.run.ordinary),
        "precision": origins.precision(one.settings),
        "metrics": one.session.summary(),
        "versions": describe_versions(),
    }
