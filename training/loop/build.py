"""From settings and a cache's statistics to a run that is ready for its first batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import Objective, build_objective
from tailrace.training.choices import KernelKind
from tailrace.training.cross_layer.sparse import build_stack_kernel
from tailrace.training.cross_layer.stack import StackArchitecture, build_stack
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.dead_features.resampling.settings import RowScorer, Surroundings
from tailrace.training.kernels.adaptive import build_kernel, missing_for_sparse
from tailrace.training.kernels.kernel import ExtraLoss, Precision, StepKernel
from tailrace.training.loop.connection import build_connection
from tailrace.training.loop.distributed import DistributedStep, Group
from tailrace.training.loop.initialise import (
    Centres,
    FeatureSlice,
    data_directions,
    initialise,
    initialise_stack,
    medians,
)
from tailrace.training.loop.optim import build_optimiser
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.shards import FeatureShards, ShardedRun, ShardedStep
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.learnt_rows import LearntRows
from tailrace.training.rows.normalisation import (
    JoinedNormalisation,
    Normalisation,
    build_normalisation,
    check_statistics,
)
from tailrace.training.rows.ordinary_rows import OrdinaryRows
from tailrace.training.rows.row_source import RowSource

logger = logging.getLogger(__name__)

_FIRST_WEIGHTS = ("reconstruction", "bias_init", "bias_init_rows", "decoder_init", "encoder_init")


def build_run(
    settings: TrainSettings,
    site: Site,
    statistics: Mapping[Side, SiteStatistics],
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision,
    name: str = "transcoder",
    row_source: RowSource | None = None,
    row_scorer: RowScorer | None = None,
    group: Group | None = None,
) -> TrainingRun:
    """Return a run with initial weights on ``device``. ``statistics``: by side, of the training rows.

    ``row_source`` gives raw rows of ``site`` to initialise from and to resample dead features from, ``row_scorer`` says
    what they cost the language model; each is needed only by settings that ask for it. With a ``group``, batches are
    slices of those of all its processes, or the features are. Raises NonFiniteActivation or SettingsError for
    activations that cannot be learnt from, SettingsError for a setting that cannot be honoured.
    """
    ordinary, statistics = _ordinary(settings, site, statistics, row_source)
    check_statistics(site.name, statistics)
    side_in, side_out = statistics["in"], statistics[site.sides[-1]]
    normalisation = build_normalisation(settings.normalisation, side_in, side_out)
    rows = LearntRows([site.name], normalisation, {} if ordinary is None else {site.name: ordinary})
    row_source = None if row_source is None else rows.source([row_source])
    objective = build_objective(settings.reconstruction, float(side_out.variance.sum()) / normalisation.scale_out**2)
    d_sae, shards = settings.n_features(site.d_in), _shards(group)
    own = FeatureSlice(0, d_sae, d_sae) if shards is None else shards.slice_of(d_sae)
    transcoder = settings.architecture.build(site.d_in, site.d_out, own.n)
    transcoder.become_slice(own.first, d_sae)
    transcoder.activation_unit = objective.activation_unit
    means = Centres(
        normalisation.inputs(torch.from_numpy(side_in.mean)), normalisation.outputs(torch.from_numpy(side_out.mean))
    )
    connection = build_connection(settings.connection, site.d_out)
    _initialise(transcoder, settings, normalisation, means, row_source, own)
    return _assemble(
        settings,
        transcoder.to(device),
        objective,
        rows,
        _kernel(build_kernel, settings, precision, device, name, group),
        means,
        extra=[] if connection is None else [connection],
        n_steps=n_steps,
        name=name,
        row_source=row_source,
        row_scorer=row_scorer,
        group=group,
        shards=shards,
    )


def build_cross_layer_run(
    settings: TrainSettings,
    sites: Sequence[Site],
    statistics: Mapping[str, Mapping[Side, SiteStatistics]],
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision,
    name: str = "transcoder",
    row_sources: Mapping[str, RowSource] | None = None,
    row_scorer: RowScorer | None = None,
    group: Group | None = None,
) -> TrainingRun:
    """Return a run of a transcoder of several layers; ``sites`` lowest first, ``statistics`` by site and side.

    ``row_sources`` draw the same rows at each site. All else, and the errors, are those of ``build_run``; the settings
    are known to have no ``cross_layer_problems``.
    """
    ordinary: dict[str, OrdinaryRows] = {}
    seen: dict[str, Mapping[Side, SiteStatistics]] = {}
    for site in sites:
        source = None if row_sources is None else row_sources[site.name]
        limits, seen[site.name] = _ordinary(settings, site, statistics[site.name], source)
        if limits is not None:
            ordinary[site.name] = limits
    for site in sites:
        check_statistics(site.name, seen[site.name])
    outs = [seen[site.name]["out"] for site in sites]
    layers = [
        build_normalisation(settings.normalisation, seen[site.name]["in"], out)
        for site, out in zip(sites, outs, strict=True)
    ]
    variances = [float(out.variance.sum()) / units.scale_out**2 for out, units in zip(outs, layers, strict=True)]
    objective = build_objective(settings.reconstruction, sum(variances))
    joined = JoinedNormalisation(layers)
    rows = LearntRows([site.name for site in sites], joined, ordinary)
    n_features, shards = settings.n_features(sites[0].d_in), _shards(group, len(sites))
    own = FeatureSlice(0, n_features, n_features) if shards is None else shards.slice_of(n_features)
    stack = build_stack(settings.architecture, len(sites), sites[0].d_in, sites[0].d_out, own.n)
    stack.activation_unit = objective.activation_unit
    means = Centres(
        joined.inputs(torch.cat([torch.from_numpy(seen[site.name]["in"].mean) for site in sites])),
        joined.outputs(torch.cat([torch.from_numpy(out.mean) for out in outs])),
    )
    initialise_stack(stack, mean_out=means.outputs, encoder_scale=settings.encoder_scale, seed=settings.seed, own=own)
    return _assemble(
        settings,
        stack.to(device),
        objective,
        rows,
        _kernel(build_stack_kernel, settings, precision, device, name, group),
        means,
        n_steps=n_steps,
        name=name,
        row_source=None if row_sources is None else rows.source([row_sources[site.name] for site in sites]),
        row_scorer=row_scorer,
        group=group,
        shards=shards,
    )


def _shards(group: Group | None, n_layers: int = 1) -> FeatureShards | None:
    """Return how the processes of ``group`` share the features, None if they do not."""
    return FeatureShards(group, n_layers) if group is not None and group.shards_features else None


def _ordinary(
    settings: TrainSettings, site: Site, statistics: Mapping[Side, SiteStatistics], row_source: RowSource | None
) -> tuple[OrdinaryRows | None, Mapping[Side, SiteStatistics]]:
    """Return which rows of ``site`` are learnt from, None for all, and their statistics."""
    if settings.max_norm_multiple is None:
        return None, statistics
    limits = OrdinaryRows.within(settings.max_norm_multiple, statistics)
    source = _needed(row_source, f"max_norm_multiple: {settings.max_norm_multiple:g}")
    return limits, limits.statistics(site.name, site.sides, source)


def _kernel(
    build: Callable[..., StepKernel],
    settings: TrainSettings,
    precision: Precision,
    device: torch.device,
    name: str,
    group: Group | None,
) -> StepKernel:
    kind = kernel_of_all(settings.kernel, device, group)
    return build(kind, precision, device, name=name, fused=takes_pairs(settings, group))


def kernel_of_all(kind: KernelKind, device: torch.device, group: Group | None) -> KernelKind:
    """Return the kernel that all processes of a group can take, since steps of two kinds ask each other other things.

    ``auto`` is dense in all where one lacks what the sparse step needs. Raises SettingsError in all for ``sparse``.
    """
    if group is None or device.type != "cuda" or kind not in ("auto", "sparse"):
        return kind
    missing = missing_for_sparse(device)
    n_missing = int(group.add_up(torch.tensor(int(missing is not None))))
    if n_missing == 0:
        return kind
    reason = missing or f"{n_missing} of {group.size} processes cannot take the sparse step, whose output says why"
    if kind == "sparse":
        raise SettingsError(f"kernel: sparse: {reason}; or use auto or dense")
    logger.info("steps are dense in all processes: %s", reason)
    return "dense"


def takes_pairs(settings: TrainSettings, group: Group | None) -> bool:
    """Tell whether gradients at pairs need not become matrices: nothing asks for their norm, or adds them up."""
    is_added_up = group is not None and not group.shards_features
    return settings.optimiser == "adam" and settings.gradient_clip is None and not is_added_up


def _assemble(
    settings: TrainSettings,
    transcoder: Transcoder,
    objective: Objective,
    rows: LearntRows,
    kernel: StepKernel,
    means: Centres,
    *,
    extra: Sequence[ExtraLoss] = (),
    n_steps: int,
    name: str,
    row_source: RowSource | None,
    row_scorer: RowScorer | None,
    group: Group | None,
    shards: FeatureShards | None,
) -> TrainingRun:
    """Return the run of a transcoder that has its first weights and lies on its device."""
    n_processes = 1 if shards is None else shards.group.size
    firing = FiringRecord(transcoder.d_sae * n_processes, transcoder.W_enc.device)
    auxiliary = settings.auxiliary.build(firing, objective, dead_after_steps=settings.dead_after_steps)
    surroundings = Surroundings(
        transcoder.d_sae, n_steps, settings.seed, means.inputs, means.outputs, row_source, row_scorer
    )
    clip, gradients = settings.gradient_clip, getattr(kernel, "gradients", None)
    if shards is not None:
        kernel, clip = ShardedStep(kernel, shards, clip=clip), None
    elif group is not None:
        kernel = DistributedStep(kernel, group)
    return (TrainingRun if shards is None else partial(ShardedRun, shards))(
        transcoder,
        objective,
        rows,
        kernel,
        build_optimiser(settings.optimiser, transcoder, lr=settings.lr, clip=clip, gradients=gradients),
        settings.build_schedule(n_steps),
        lr=settings.lr,
        firing=firing,
        extra=[*([] if auxiliary is None else [auxiliary]), *extra],
        resampler=settings.resampling.build(surroundings),
        average=None if settings.ema is None else WeightAverage(transcoder, settings.ema),
        name=name,
    )


def cross_layer_problems(settings: TrainSettings, sites: Sequence[Site]) -> list[str]:
    """Return a sentence for every setting, and every site, of which no cross-layer transcoder can be made."""
    problems = []
    architecture = settings.architecture
    if not isinstance(architecture, StackArchitecture):
        problems.append(
            f"architecture: {architecture.kind} features have no threshold in use; a cross-layer transcoder can be "
            "batch_topk, jumprelu or relu"
        )
    if architecture.skip:
        problems.append("architecture.skip: a cross-layer transcoder has no skip path; leave it out")
    if settings.optimiser == "muon":
        problems.append("optimiser: muon would mix encoders of layers that read different inputs; use adam or adamw")
    if settings.kernel == "compiled":
        problems.append("kernel: compiled is for transcoders of one layer; use auto, dense or sparse")
    if settings.auxiliary.kind == "ghost":
        problems.append("auxiliary: ghost is for transcoders of one layer; use auxk")
    if settings.connection.kind != "none":
        problems.append("connection: is for transcoders of one layer; leave it out")
    if getattr(architecture, "tied_bias", False):
        problems.append("architecture.tied_bias: is for autoencoders; leave it out")
    plain = TrainSettings()
    problems += [
        f"{name}: a cross-layer transcoder is trained with {getattr(plain, name)!r} only; leave it out"
        for name in _FIRST_WEIGHTS
        if getattr(settings, name) != getattr(plain, name)
    ]
    if len(sites) < 2:
        problems.append(f"a cross-layer transcoder takes at least two layers; got {len(sites)}")
    if len({(site.d_in, site.d_out) for site in sites}) > 1:
        widths = ", ".join(f"{site.name} {site.d_in} to {site.d_out}" for site in sites)
        problems.append(f"layers of one width are wanted; the sites go from {widths}")
    problems += [f"site {site.name}: is an autoencoder's" for site in sites if site.hook_in == site.hook_out]
    if sites:
        problems += architecture.problems(settings.n_features(sites[0].d_in))
    return problems


def _initialise(
    transcoder: Transcoder,
    settings: TrainSettings,
    normalisation: Normalisation,
    means: Centres,
    row_source: RowSource | None,
    own: FeatureSlice,
) -> None:
    rows = _initial_rows(settings, transcoder, normalisation, row_source)
    begin, decoder = means, None
    if rows is not None and settings.decoder_init == "data":
        decoder = data_directions(rows.outputs, means.outputs, own, settings.seed)
    if settings.bias_init == "zeros":
        begin = Centres(torch.zeros_like(means.inputs), torch.zeros_like(means.outputs))
    elif rows is not None and settings.bias_init == "geometric_median":
        n = settings.bias_init_rows
        begin = medians(Batch(rows.inputs[:n], rows.outputs[:n]))
    initialise(
        transcoder,
        mean_in=begin.inputs,
        mean_out=begin.outputs,
        encoder_scale=settings.encoder_scale,
        encoder_init=settings.encoder_init,
        decoder=decoder,
        seed=settings.seed,
        own=own,
    )


def _initial_rows(
    settings: TrainSettings, transcoder: Transcoder, normalisation: Normalisation, row_source: RowSource | None
) -> Batch | None:
    """Return the normalised rows that initial weights are made from, on their device; None if none are needed."""
    n_rows = settings.initial_rows(transcoder.d_in)
    if n_rows == 0:
        return None
    wanting = [
        f"{setting}: {value}"
        for setting, value in (("bias_init", settings.bias_init), ("decoder_init", settings.decoder_init))
        if value in ("geometric_median", "data")
    ]
    raw = _needed(row_source, *wanting)(n_rows, 0).batch
    return normalisation.to(raw.inputs.device, raw.inputs.dtype).apply(raw)


def _needed(row_source: RowSource | None, *settings: str) -> RowSource:
    if row_source is None:
        need = "needs" if len(settings) == 1 else "need"
        raise SettingsError(
            f"{' and '.join(settings)} {need} training rows to begin with, and this run has no source of rows; train "
            "from a cache, or leave it out"
        )
    return row_source
