"""The language model that a cache was made with, opened again, and the cache's contexts as it was shown them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tailrace.analysis.evaluate.evaluation import ContextBatch
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import LanguageModel, explained_failures, without_padding_advice
from tailrace.pipeline.model.locations import recorded_location
from tailrace.pipeline.model.of_transcoders import load_recorded
from tailrace.pipeline.text.settings import RowMask
from tailrace.storage.activation_cache import ActivationCache, CacheSplit
from tailrace.storage.errors import OutOfMemoryError
from tailrace.storage.shuffle import philox


@dataclass(frozen=True)
class RecordedModel:
    """A cache and its language model."""

    cache: ActivationCache
    model: LanguageModel
    row_mask: RowMask
    """Which tokens of contexts the cache keeps as rows."""
    contexts_per_batch: int
    """Contexts per pass when the cache was made: the same grid gives the same bits."""

    @property
    def bridge(self) -> Any:
        """The TransformerLens model."""
        return self.model.bridge

    def batch(self, split: CacheSplit, contexts: np.ndarray) -> ContextBatch:
        """Return contexts by their ids; outputs are replaced where the cache has rows."""
        tokens = split.context_tokens(contexts)
        where = torch.from_numpy(self.row_mask(tokens, split.marked_documents(contexts)))
        device = self.model.device
        return ContextBatch(
            np.asarray(contexts, np.int64), torch.from_numpy(tokens.astype(np.int64)).to(device), where.to(device)
        )

    def batches(self, split: CacheSplit, contexts: np.ndarray, size: int) -> Iterator[ContextBatch]:
        """Return ``batch`` of every ``size`` contexts in turn."""
        for start in range(0, len(contexts), size):
            yield self.batch(split, contexts[start : start + size])


def open_recorded_model(cache: ActivationCache, *, model: str | None = None, device: str = "cpu") -> RecordedModel:
    """Load the model that ``cache`` was made with; ``model`` says where it lies if it moved.

    Raises ModelError if it cannot be loaded, ArtifactMismatch, with every difference, if it is another one.
    """
    recorded = cache.manifest.model
    request = {**cache.manifest.request, "tokens": "all"}
    moved = {"model": model or recorded_location(recorded, str(request["model"]), cache.path)}
    settings = CacheSettings.read(request, moved, where=str(cache.path)).in_dtype_of(recorded)
    loaded = load_recorded(settings, recorded, f"{cache.path} was made with", device)
    return RecordedModel(cache, loaded, settings.rows_of(loaded), settings.contexts_per_batch)


def sample_contexts(split: CacheSplit, n_contexts: int, seed: int) -> np.ndarray:
    """Return the ids of a uniform sample of a split's contexts, ascending; all of them if it has no more."""
    generator = np.random.Generator(philox(seed, f"evaluate/{split.name}"))
    chosen = generator.choice(split.n_contexts, min(n_contexts, split.n_contexts), replace=False)
    return np.asarray(np.sort(chosen), np.int64)


@contextmanager
def explained_passes(n_contexts: int) -> Iterator[None]:
    """Run passes of the model inside; if memory runs out, say which batch to try."""
    try:
        with explained_failures(n_contexts), without_padding_advice():
            yield
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{error} (--contexts-per-batch)") from error
