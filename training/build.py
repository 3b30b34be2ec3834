"""From settings and a cache's statistics to a run that is ready for its first batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from storage.cache_format import Site
from storage.encodings import Side
from storage.statistics import SiteStatistics
from training.ema import WeightAverage
from training.initialise import initialise
from training.kernels.adaptive import build_kernel
from training.kernels.kernel import Precision
from training.normalisation import build_normalisation, check_statistics
from training.objectives import build_objective
from training.optim import build_optimiser
from training.run import TrainingRun
from training.settings import TrainSettings


def build_run(
    settings: TrainSettings,
    site: Site,
    statistics: Mapping[Side, SiteStatistics],
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision,
    name: str = "transcoder",
) -> TrainingRun:
    """Return a run with initial weights on ``device``. ``statistics``: by side, of the training rows.

    Raises NonFiniteActivation or SettingsError for activations that cannot be learnt from.
    """
    check_statistics(site.name, statistics)
    side_in, side_out = statistics["in"], statistics[site.sides[-1]]
    normalisation = build_normalisation(settings.normalisation, side_in, side_out)
    objective = build_objective(settings.reconstruction, float(side_out.variance.sum()) / normalisation.scale_out**2)
    transcoder = settings.architecture.build(site.d_in, site.d_out, settings.n_features(site.d_in))
    transcoder.activation_unit = objective.activation_unit
    initialise(
        transcoder,
        mean_in=normalisation.inputs(torch.from_numpy(side_in.mean)),
        mean_out=normalisation.outputs(torch.from_numpy(side_out.mean)),
        encoder_scale=settings.encoder_scale,
        seed=settings.seed,
    )
    transcoder = transcoder.to(device)
    return TrainingRun(
        transcoder,
        objective,
        normalisation,
        build_kernel(settings.kernel, precision, device, name=name),
        build_optimiser(settings.optimiser, transcoder, lr=settings.lr, clip=settings.gradient_clip),
        settings.build_schedule(n_steps),
        site=site.name,
        lr=settings.lr,
        average=None if settings.ema is None else WeightAverage(transcoder, settings.ema),
        name=name,
    )
