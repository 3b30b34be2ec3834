"""Training and publishing transcoders that share one reading of their rows; a transcoder alone is the case of one.

Each run has a draft of its own, and ends as the artifact it would be if it had been trained alone, byte for byte. It
has one site, or several if it is a cross-layer transcoder's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.shared.compute import say_once
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.train.cost import Planned, cost_line
from tailrace.pipeline.train.model_scores import ModelScores
from tailrace.pipeline.train.sources import TrainingRows, TrainingSource, choose_sites
from tailrace.pipeline.train.warm_start import WarmStart
from tailrace.storage.artifact import read_own, seal, write_atomically
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ActionableError, ArtifactCorrupt, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS, CROSS_LAYER_KIND
from tailrace.training.architectures.manifest import BASELINES, CHECKPOINTS, KIND, MARK, TIMING
from tailrace.training.architectures.transcoder import describe_versions
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_cross_layer_run, build_run
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.cost import check_memory
from tailrace.training.loop.curves import write_baselines
from tailrace.training.loop.distributed import Group, SharedRows, broadcast_run
from tailrace.training.loop.evaluate import linear_fvu
from tailrace.training.loop.loggers import TENSORBOARD, WANDB, Logger
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.session import PeriodicHook, Session
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import ShardedRun, refuse_shards
from tailrace.training.loop.train_all import train_all
from tailrace.training.rows.normalisation import JoinedNormalisation
from tailrace.training.rows.ordinary_rows import massive_warning
from tailrace.training.rows.row_source import RowSource

BESIDE = (BASELINES, CHECKPOINTS, TIMING, TENSORBOARD, WANDB)
"""What lies in a transcoder's folder and is no part of it."""
_BASELINE_ROWS, _PIECE_ROWS, _BASELINE_STEP = 16_384, 4096, 1 << 40
"""A linear map is fitted to so many rows or 16 for each input width, in pieces drawn for steps that no run comes to."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
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

    @property
    def sharing(self) -> dict[str, Any]:
        """What several processes share, as ``training_bytes`` takes it."""
        group = self.group
        if group is None:
            return {}
        return {"n_shards": group.size} if group.shards_features else {"shares_rows": True}

    def sites(self, settings: TrainSettings, source: TrainingSource) -> list[Site]:
        """Return the sites to train on, lowest layer first.

        Raises SettingsError listing every setting that fits neither the rows nor the weights to start from.
        """
        sites = choose_sites(settings, source)
        if self.group is not None and self.group.shards_features:
            refuse_shards(settings, sites, self.group.size, starts=self.start is not None)
        if self.start is not None and (problems := self.start.problems(settings, sites)):
            raise SettingsError(
                f"{self.start.path}: cannot be started from, a transcoder of another shape; use its settings:\n"
                + "\n".join(f"  {line}" for line in problems)
            )
        return sites


@dataclass(frozen=True)
class RunDraft:
    """An unpublished transcoder: what it is to be, and where it is written."""

    settings: TrainSettings
    sites: Sequence[Site]
    draft: Draft

    @property
    def path(self) -> Path:
        """The draft's directory."""
        return self.draft.path


def kind_of(settings: TrainSettings) -> str:
    """Return the kind of artifact that a run of ``settings`` publishes."""
    return CROSS_LAYER_KIND if settings.cross_layer else KIND


def train_drafts(
    source: TrainingSource,
    drafts: Mapping[str, RunDraft],
    context: RunContext,
    *,
    output: Path,
    checkpoint_steps: int | None,
    quiet: bool,
    others_go_on: bool = False,
    says_cost: bool = True,
) -> None:
    """Train the unpublished drafts, by name, from where they were left, and publish each when it is done.

    All have the same ``batch_rows`` and ``order_seed``. ``output`` is the artifact they belong to. With
    ``others_go_on``, a run that cannot go on (``ENDS_A_RUN``) leaves a mark (``has_ended``) and not the others.
    """
    sites = {site.name: site for draft in drafts.values() for site in draft.sites}
    shapes = [(draft.settings, [(site.d_in, site.d_out) for site in draft.sites]) for draft in drafts.values()]
    check_memory(shapes, context.device, **context.sharing)
    if context.device.type == "cuda" and not quiet:
        chosen = " and ".join(sorted({context.precision(draft.settings) for draft in drafts.values()}))
        say_once(f"products: {chosen} in steps; scores and auxiliary losses of bfloat16 runs in TF32")
    with ExitStack() as stack:
        rows: TrainingRows = stack.enter_context(source.open(list(sites.values()), output))
        sessions = []
        for name, draft in drafts.items():
            session = _open_session(name, draft, source, rows, context, checkpoint_steps)
            sessions.append(stack.enter_context(session))
        if says_cost and not quiet:
            planned = [Planned(settings, widths, rows.n_steps(settings)) for settings, widths in shapes]
            say_once(cost_line(planned, context.device, **context.sharing))
        _write_baselines(drafts.values(), sessions, rows)
        stream, group = rows.stream, context.group
        before_first_step = None
        if group is not None and not group.shards_features:
            (session,) = sessions
            stream = SharedRows(stream, group)
            before_first_step = partial(broadcast_run, group, session.run, stream)
        n_steps = max((session.n_steps for session in sessions), default=0)
        progress = stack.enter_context(Progress(n_steps, "train", "steps", quiet=quiet))
        train_all(
            stream,
            sessions,
            checkpoint_steps=checkpoint_steps,
            give_up=_mark_diverged if others_go_on else None,
            after_step=_shown(progress, sessions),
            before_first_step=before_first_step,
        )
        for session in sessions:
            session.run.release()


def _write_baselines(drafts: Iterable[RunDraft], sessions: Sequence[Session], rows: TrainingRows) -> None:
    """Write beside each run of one site what the best linear map of its rows scores, where rows can be drawn."""
    known: dict[tuple[Site, float | None], float | None] = {}
    for draft, session in zip(drafts, sessions, strict=True):
        site, heldout = draft.sites[0], rows.heldout(draft.sites)
        source = rows.fresh_rows(site, 0) if heldout is not None else None  # the same rows for every run
        is_one_map = len(draft.sites) == 1 and site.hook_in != site.hook_out  # an autoencoder's best map copies
        if source is None or heldout is None or not is_one_map or (draft.path / BASELINES).exists():
            continue
        key = (site, draft.settings.max_norm_multiple)
        if key not in known:
            pieces = range(-(-max(_BASELINE_ROWS, 16 * site.d_in) // _PIECE_ROWS))
            drawn = (source(_PIECE_ROWS, _BASELINE_STEP + piece).batch for piece in pieces)
            scored = (batch[site.name] for batch in heldout(_BASELINE_ROWS))
            known[key] = linear_fvu(drawn, scored, session.run.rows.ordinary.get(site.name))
        write_baselines(draft.path, known[key])


def has_ended(draft: Draft) -> bool:
    """Return whether the run of a draft is published or marked as diverged."""
    return draft.published or (draft.path / MARK).exists()


def read_mark(path: Path) -> dict[str, Any]:
    """Return what a run that diverged left; raise ArtifactCorrupt if that has changed."""
    try:
        return read_own(path)
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(
            f"{error}, or delete it and run the same command again: the run goes on from its last checkpoint, and "
            "leaves it anew"
        ) from error


def _mark_diverged(session: Session, error: ActionableError) -> None:
    """Leave a mark that outlives this process: continued, the run would end here again."""
    name = session.run.name
    reason = str(error) if str(error).startswith(name) else f"{name}: {error}"
    logger.warning("%s; the other runs go on", reason)
    write_atomically(session.directory / MARK, seal({"reason": reason, **session.summary()}))


def _shown(progress: Progress, sessions: Sequence[Session]) -> Callable[[int], None]:
    """Return what to call with the number of steps done; of runs side by side the first one's numbers are shown."""
    whose = f"{sessions[0].run.name}: " if len(sessions) > 1 else ""

    def show(step: int) -> None:
        if not progress.done:
            progress.skip(step - 1)  # taken before the run was continued
        progress.update(note=whose + sessions[0].numbers())

    return show


def _open_session(
    name: str,
    draft: RunDraft,
    source: TrainingSource,
    rows: TrainingRows,
    context: RunContext,
    checkpoint_steps: int | None,
) -> Session:
    n_steps = rows.n_steps(draft.settings)
    for sentence in [*draft.settings.without_effect(n_steps), *_massive(draft, rows)]:
        logger.warning("%s: %s", draft.path, sentence)
    session = Session(
        draft.path,
        _build(name if len(draft.sites) == 1 else draft.path.name, draft.settings, draft.sites, rows, context),
        draft.settings,
        n_steps=n_steps,
        heldout=rows.heldout(draft.sites),
        checkpoint_steps=checkpoint_steps,
        hooks=[*context.scores.hooks(draft.sites), *context.hooks],
        loggers=context.loggers(),
        finish=lambda: _publish(draft, session, source, rows, context),
    )
    return session


def _massive(draft: RunDraft, rows: TrainingRows) -> Iterator[str]:
    for site in draft.sites:
        outputs = rows.statistics(site)[site.sides[-1]]
        if (sentence := massive_warning(site.name, outputs, draft.settings.max_norm_multiple)) is not None:
            yield sentence


def _build(
    name: str, settings: TrainSettings, sites: Sequence[Site], rows: TrainingRows, context: RunContext
) -> TrainingRun:
    shared: dict[str, Any] = {
        "n_steps": rows.n_steps(settings),
        "device": context.device,
        "precision": context.precision(settings),
        "name": name,
        "row_scorer": context.scores.row_scorer(settings, sites),
        "group": context.group,
    }
    sources: dict[str, RowSource] = {}
    for site in sites:
        if (fresh := rows.fresh_rows(site, settings.seed)) is not None:
            sources[site.name] = fresh
    if settings.cross_layer:
        statistics = {site.name: rows.statistics(site) for site in sites}
        run = build_cross_layer_run(settings, sites, statistics, row_sources=sources or None, **shared)
    else:
        (site,) = sites
        run = build_run(settings, site, rows.statistics(site), row_source=sources.get(site.name), **shared)
    run.tensor_cores = context.device.type == "cuda" and context.precision(settings) == "bfloat16"
    if context.start is not None:
        context.start.apply(run)
    return run


def train_beside(source: TrainingSource, settings: TrainSettings, context: RunContext, *, output: Path) -> None:
    """Take the steps of a run whose files the first process of the group writes; nothing is written here."""
    assert context.group is not None, "only a process of a group trains beside another"
    sites = context.sites(settings, source)
    check_memory([(settings, [(site.d_in, site.d_out) for site in sites])], context.device, **context.sharing)
    with ExitStack() as stack:
        rows: TrainingRows = stack.enter_context(source.open(sites, output))
        run = _build("transcoder", settings, sites, rows, context)
        if isinstance(run, ShardedRun):
            run.serve()
            return
        stream = SharedRows(rows.stream, context.group)
        broadcast_run(context.group, run, stream)
        for _ in range(run.n_steps_done, rows.n_steps(settings)):
            run.step(stream.next_batch())


def _publish(
    draft: RunDraft, session: Session, source: TrainingSource, rows: TrainingRows, context: RunContext
) -> None:
    rows.confirm()
    files = session.export()
    described = _describe(draft, session, source, rows, context)
    draft.draft.publish(described, files, beside=BESIDE, written=session.written)
    Checkpoints(draft.path / CHECKPOINTS).discard_after(-1)
    logger.info("%s: published after %d steps", draft.path, session.run.n_steps_done)


def _describe(
    draft: RunDraft, session: Session, source: TrainingSource, rows: TrainingRows, context: RunContext
) -> dict[str, Any]:
    """Return the manifest of a trained transcoder."""
    described, settings, run = source.description(), draft.settings, session.run
    if context.start is not None:
        described["inputs"] = {**described["inputs"], "transcoder": context.start.request["from"]}
    return {
        "format": ARTIFACT_FORMATS[kind_of(settings)],
        **described,
        **_described_sites(draft, run, rows),
        "d_sae": settings.n_features(draft.sites[0].d_in),
        "architecture": settings.architecture.model_dump(mode="json"),
        "precision": context.precision(settings),
        "metrics": session.summary(),
        "versions": describe_versions(),
    }


def _described_sites(draft: RunDraft, run: TrainingRun, rows: TrainingRows) -> dict[str, Any]:
    """Return what a manifest says of the sites; of several, also the score of each layer's output on held-out rows."""
    units, limits = run.normalisation, {name: asdict(rows) for name, rows in run.rows.ordinary.items()}
    kind = draft.settings.normalisation
    if not isinstance(units, JoinedNormalisation):
        (site,) = draft.sites
        return {
            "site": site.as_json(),
            "normalisation": {"kind": kind, "scale_in": units.scale_in, "scale_out": units.scale_out},
            "learnt_from": limits.get(site.name),
        }
    scales = [[layer.scale_in for layer in units.layers], [layer.scale_out for layer in units.layers]]
    heldout, scores = rows.heldout(draft.sites), {}
    if heldout is not None:
        scores = dict(run.score_layers(heldout(None)))
    return {
        "sites": [site.as_json() for site in draft.sites],
        "normalisation": {"kind": kind, "scale_in": scales[0], "scale_out": scales[1]},
        "learnt_from": limits or None,
        "layers": [{"site": name, **score.record()} for name, score in scores.items()],
    }
