"""What training can ask the language model, without knowing it: the loss with a transcoder in place.

``SplicedLoss`` is a periodic hook of the trainer, ``LossIncrease`` a scorer of rows for resampling dead features.
Both are given the transcoder in raw units (folded) and work on a copy in evaluation mode, so training goes on with
weights, mode and gradients as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.evaluate.evaluation import ContextBatch, refuse_nonfinite
from tailrace.analysis.evaluate.next_tokens import next_token_divergences, next_token_losses
from tailrace.analysis.evaluate.recovered import recovered
from tailrace.analysis.splice.replacement import Substitute, Transcoded, ZeroAblated, run_replaced
from tailrace.pipeline.cache.recorded_model import RecordedModel, explained_passes, sample_contexts
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.cross_layer.layers import split_layers
from tailrace.training.cross_layer.stack import CrossLayerTranscoder


class SplicedLoss:
    """Cross entropy with a transcoder in place, on a sample of contexts that is the same at every call.

    The original and the zero-ablated model are run once, when this is made. The original's logits are kept where
    the model lies, for KL: n_contexts · positions · vocabulary numbers in the model's dtype, 410 MB for 16 contexts of
    128 tokens and 50,000 tokens of vocabulary in float32.
    """

    def __init__(
        self,
        recorded: RecordedModel,
        sites: Sequence[str],
        *,
        split: str = "heldout",
        n_contexts: int = 16,
        contexts_per_batch: int = 8,
        seed: int = 0,
    ) -> None:
        self._model = _SplicedModel(recorded, sites)
        rows = recorded.cache.split(split)
        contexts = sample_contexts(rows, n_contexts, seed)
        self._batches = list(recorded.batches(rows, contexts, contexts_per_batch))
        self._original: list[Tensor] = []
        losses, zero = [], []
        for batch in self._batches:
            logits, loss = self._model.run(batch, {})
            losses.append(loss)
            zero.append(self._model.run(batch, dict.fromkeys(self._model.sites, ZeroAblated()))[1])
            self._original.append(logits)
        self.ce_original = float(torch.cat(losses).mean())
        """Mean over predictions of the model itself, in nats."""
        self.ce_zero = float(torch.cat(zero).mean())
        """The same with the sites' outputs set to zero."""

    def __call__(self, step: int, transcoder: Transcoder) -> dict[str, float]:  # noqa: ARG002 - a periodic hook's
        """Return ce_original, ce_spliced, ce_zero and kl, in nats, and ce_recovered, after ``step`` steps.

        ``ce_recovered`` is left out where zero ablation costs nothing. Raises NonFiniteActivation for a transcoder
        that makes the model's loss infinite or NaN.
        """
        substitutes = self._model.in_place(transcoder)
        losses, divergences = [], []
        for batch, original in zip(self._batches, self._original, strict=True):
            logits, loss = self._model.run(batch, substitutes)
            losses.append(loss)
            divergences.append(next_token_divergences(original, logits))
        ce_spliced = float(torch.cat(losses).mean())
        share = recovered(self.ce_zero, ce_spliced, self.ce_original)
        return {
            "ce_original": self.ce_original,
            "ce_spliced": ce_spliced,
            "ce_zero": self.ce_zero,
            **({} if share is None else {"ce_recovered": share}),
            "kl": float(torch.cat(divergences).mean()),
        }


class LossIncrease:
    """By how much the model's loss at training rows rises when a transcoder is spliced in, row by row.

    A row at position p is scored by the prediction made there, of the token at p + 1. Losses are subtracted prediction
    by prediction: subtracting them from a batch's mean would favour rows that are easy to predict.
    """

    def __init__(self, recorded: RecordedModel, sites: Sequence[str], *, contexts_per_batch: int = 8) -> None:
        self._model = _SplicedModel(recorded, sites)
        self._recorded = recorded
        self._split = recorded.cache.split("train")
        self._contexts_per_batch = contexts_per_batch

    def __call__(self, transcoder: Transcoder, contexts: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return float64 (n,): max(0, spliced − original) in nats at rows given by context and position.

        Rows at the last position of a context predict nothing and score 0. Raises SettingsError for rows that the
        training split cannot have, NonFiniteActivation for a transcoder that makes a loss infinite or NaN.
        """
        contexts, positions = np.asarray(contexts, np.int64), np.asarray(positions, np.int64)
        self._check(contexts, positions)
        substitutes = self._model.in_place(transcoder)
        distinct, context_index = np.unique(contexts, return_inverse=True)
        increases = np.zeros((len(distinct), self._split.layout.context_length))
        done = 0
        for batch in self._recorded.batches(self._split, distinct, self._contexts_per_batch):
            before, after = (self._model.run(batch, kind)[1] for kind in ({}, substitutes))
            increases[done : done + len(batch.contexts), :-1] = (after - before).numpy()
            done += len(batch.contexts)
        return np.asarray(np.maximum(increases[context_index, positions], 0.0))

    def _check(self, contexts: np.ndarray, positions: np.ndarray) -> None:
        problems = []
        if contexts.ndim != 1 or contexts.shape != positions.shape:
            problems.append(
                f"contexts {contexts.shape} and positions {positions.shape}: wanted two vectors of one length"
            )
        for name, values, n in (
            ("contexts", contexts, self._split.n_contexts),
            ("positions", positions, self._split.layout.context_length),
        ):
            if values.size and not 0 <= values.min() <= values.max() < n:
                problems.append(
                    f"{name} reach from {values.min()} to {values.max()}, the training split has 0 to {n - 1}"
                )
        if problems:
            raise SettingsError("cannot score these rows:\n" + "\n".join(f"  {line}" for line in problems))


class _SplicedModel:
    """The model with some sites that can be replaced: one, or those of a cross-layer transcoder, lowest first."""

    def __init__(self, recorded: RecordedModel, sites: Sequence[str]) -> None:
        if missing := [site for site in sites if site not in recorded.cache.sites]:
            raise SettingsError(
                f"{recorded.cache.path}: has no site {', '.join(map(repr, missing))}, only "
                f"{', '.join(recorded.cache.sites)}; choose of these"
            )
        self._recorded = recorded
        self.sites: list[Site] = [recorded.cache.sites[site] for site in sites]

    def run(self, batch: ContextBatch, substitutes: Mapping[Site, Substitute]) -> tuple[Tensor, Tensor]:
        """Return logits (contexts, positions, vocab) and losses (contexts, positions − 1)."""
        with torch.inference_mode(), explained_passes(len(batch.contexts)):
            logits = run_replaced(self._recorded.bridge, batch.tokens, substitutes, batch.where)
        losses = next_token_losses(logits, batch.tokens)
        refuse_nonfinite(losses, " and ".join(site.name for site in self.sites), batch.contexts)
        return logits, losses

    def in_place(self, transcoder: Transcoder) -> dict[Site, Substitute]:
        """Return what stands in for each site: copies of a folded transcoder as it would be loaded."""
        published = copy.deepcopy(transcoder).requires_grad_(False).eval().to(self._recorded.model.device)
        if isinstance(published, CrossLayerTranscoder):
            return dict(zip(self.sites, map(Transcoded, split_layers(published, self.sites)), strict=True))
        (site,) = self.sites
        return {site: Transcoded(published)}
