"""From settings and a cache's statistics to a run that is ready for its first batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from storage.cache_format import Site
from storage.encodings import Side
from storage.statistics import SiteStatistics
from training.initialise import initialise
from training.normalisation import build_normalisation, check_statistics
from training.objectives import build_objective
from training.run import TrainingRun
from training.settings import TrainSettings
from training.step import AutogradStep, Precision


def build_run(
    settings: TrainSettings,
    site: Site,
    statistics: Mapping[Side, SiteStatistics],
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision,
) -> TrainingRun:
    """Return a run with initial weights on ``device``. ``statistics``: by side, of the training rows.

    Raises NonFiniteActivation or SettingsError for activations that cannot be learnt from.
    """
    check_statistics(site.name, statistics)
    side_in, side_out = statistics["in"], statistics[site.sides[-1]]
    normalisation = build_normalisation(settings.normalisation, side_in, side_out)
    transcoder = settings.architecture.build(site.d_in, site.d_out, settings.n_features(site.d_in))
    initialise(
        transcoder,
        mean_in=normalisation.inputs(torch.from_numpy(side_in.mean)),
        mean_out=normalisation.outputs(torch.from_numpy(side_out.mean)),
        encoder_scale=settings.encoder_scale,
        seed=settings.seed,
    )
    total_variance = float(side_out.variance.sum()) / normalisation.scale_out**2
    return TrainingRun(
        transcoder.to(device),
        build_objective(settings.reconstruction, total_variance),
        normalisation,
        AutogradStep(precision),
        settings.schedule(n_steps),
        lr=settings.lr,
        gradient_clip=settings.gradient_clip,
        name=site.name,
    )
