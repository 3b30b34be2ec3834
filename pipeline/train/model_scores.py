"""Asking the language model now and then how it does with the transcoder in place, while that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.pipeline.train.sources import CacheSource, TrainingSource
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.dead_features.resampling.settings import RowScorer
from tailrace.training.loop.session import PeriodicHook
from tailrace.training.loop.settings import TrainSettings

if TYPE_CHECKING:
    from tailrace.pipeline.cache.recorded_model import RecordedModel


class ModelScores:
    """The language model of a cache, loaded at most once, and its hooks for training."""

    def __init__(self, settings: ModelScoreSettings, source: TrainingSource, *, model: str | None, device: str) -> None:
        self._settings, self._source, self._model, self._device = settings, source, model, device
        self._recorded: RecordedModel | None = None
        self._hooks: dict[tuple[str, ...], PeriodicHook] = {}
        if settings.evaluate_model_every is not None and not isinstance(source, CacheSource):
            raise SettingsError(
                "evaluate_model_every: contexts to run come from a cache, which live training has none of; leave it "
                "out, and use `pipeline evaluate` on a cache afterwards"
            )

    @property
    def request(self) -> dict[str, Any]:
        """What decides the scores; empty if none are asked for, so that such runs are what they always were."""
        if self._settings.evaluate_model_every is None:
            return {}
        return {"model_scores": self._settings.model_dump(mode="json")}

    def hooks(self, sites: Sequence[Site]) -> list[tuple[int, PeriodicHook]]:
        """Return (every so many steps, hook) for runs on ``sites``; load the model. Raises the errors of loading."""
        every = self._settings.evaluate_model_every
        if every is None:
            return []
        names = tuple(site.name for site in sites)
        if names not in self._hooks:
            from tailrace.pipeline.train.loss_hooks import SplicedLoss

            self._hooks[names] = SplicedLoss(self.recorded(), names, n_contexts=self._settings.evaluate_model_contexts)
        return [(every, self._hooks[names])]

    def row_scorer(self, settings: TrainSettings, sites: Sequence[Site]) -> RowScorer | None:
        """Return what says how much rows cost the language model, for settings that resample by it; else None.

        None as well where there is no cache to find rows' contexts in.
        """
        if getattr(settings.resampling, "resample_by", None) != "model_loss" or not isinstance(
            self._source, CacheSource
        ):
            return None
        from tailrace.pipeline.train.loss_hooks import LossIncrease

        return LossIncrease(self.recorded(), [site.name for site in sites])

    def recorded(self) -> RecordedModel:
        """Return the cache and its language model."""
        if self._recorded is None:
            # Loaded by whoever asks: training does without a language model, and without the libraries it needs.
            from tailrace.pipeline.cache.recorded_model import open_recorded_model

            assert isinstance(self._source, CacheSource)
            self._recorded = open_recorded_model(self._source.cache, model=self._model, device=self._device)
        return self._recorded
