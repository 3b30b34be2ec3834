"""From settings and a cache's statistics to a run that is ready for its first batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tailrace.storage.cache_format import Site
from tailrace.storage.encodings import Side
from tailrace.storage.errors import SettingsError
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import build_objective
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.dead_features.resampling.settings import RowScorer, Surroundings
from tailrace.training.kernels.adaptive import build_kernel
from tailrace.training.kernels.kernel import Precision
from tailrace.training.loop.distributed import DistributedStep, Group
from tailrace.training.loop.initialise import Centres, data_directions, initialise, medians
from tailrace.training.loop.optim import build_optimiser
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.normalisation import Normalisation, build_normalisation, check_statistics
from tailrace.training.rows.ordinary_rows import OrdinaryRows
from tailrace.training.rows.row_source import RowSource


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
    slices of those of all its processes. Raises NonFiniteActivation or
    SettingsError for activations that cannot be learnt from, SettingsError for a setting that cannot be honoured.
    """
    ordinary = None
    if settings.max_norm_multiple is not None:
        ordinary = OrdinaryRows.within(settings.max_norm_multiple, statistics)
        row_source = ordinary.draw(_needed(row_source, f"max_norm_multiple: {settings.max_norm_multiple:g}"))
        statistics = ordinary.statistics(site.name, site.sides, row_source)
    check_statistics(site.name, statistics)
    side_in, side_out = statistics["in"], statistics[site.sides[-1]]
    normalisation = build_normalisation(settings.normalisation, side_in, side_out)
    objective = build_objective(settings.reconstruction, float(side_out.variance.sum()) / normalisation.scale_out**2)
    transcoder = settings.architecture.build(site.d_in, site.d_out, settings.n_features(site.d_in))
    transcoder.activation_unit = objective.activation_unit
    means = Centres(
        normalisation.inputs(torch.from_numpy(side_in.mean)), normalisation.outputs(torch.from_numpy(side_out.mean))
    )
    connection = settings.connection.build(site.d_out)
    resampler = settings.resampling.build(
        Surroundings(transcoder.d_sae, n_steps, settings.seed, means.inputs, means.outputs, row_source, row_scorer)
    )
    _initialise(transcoder, settings, normalisation, means, row_source)
    transcoder = transcoder.to(device)
    firing = FiringRecord(transcoder.d_sae, device)
    kernel = build_kernel(settings.kernel, precision, device, name=name)
    auxiliary = settings.auxiliary.build(firing, objective, dead_after_steps=settings.dead_after_steps)
    return TrainingRun(
        transcoder,
        objective,
        normalisation,
        kernel if group is None else DistributedStep(kernel, group),
        build_optimiser(settings.optimiser, transcoder, lr=settings.lr, clip=settings.gradient_clip),
        settings.build_schedule(n_steps),
        site=site.name,
        lr=settings.lr,
        firing=firing,
        extra=[term for term in (auxiliary, connection) if term is not None],
        resampler=resampler,
        average=None if settings.ema is None else WeightAverage(transcoder, settings.ema),
        ordinary=ordinary,
        name=name,
    )


def _initialise(
    transcoder: Transcoder,
    settings: TrainSettings,
    normalisation: Normalisation,
    means: Centres,
    row_source: RowSource | None,
) -> None:
    rows = _initial_rows(settings, transcoder, normalisation, row_source)
    begin, decoder = means, None
    if rows is not None and settings.decoder_init == "data":
        decoder = data_directions(rows.outputs, means.outputs, transcoder.d_sae, settings.seed)
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
