"""The stage ``pipeline evaluate``: the language model with transcoders in place of its MLPs, on a cache's contexts.

Runs the model, unlike training and analysis: on stored contexts, so no text is opened, and with the row filter that
the cache was made with, so that outputs are replaced exactly where a transcoder could have learnt them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tailrace.analysis.evaluate.evaluation import (
    ALL_SITES,
    TOKEN_SCHEMA,
    ContextBatch,
    Evaluation,
    SplicedSite,
    token_rows,
)
from tailrace.analysis.evaluate.splice_scores import SpliceScore
from tailrace.pipeline.analyze.stage import check_same_site
from tailrace.pipeline.artifacts.manifests import EvaluationManifest
from tailrace.pipeline.artifacts.transcoders import (
    PublishedTranscoder,
    TranscoderLayer,
    layers_by_site,
    layers_of,
    open_transcoders,
)
from tailrace.pipeline.cache.learnt_rows import LearntContexts, LearntTokens
from tailrace.pipeline.cache.recorded_model import RecordedModel, explained_passes, open_recorded_model, sample_contexts
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.stage import MODEL_LIBRARIES, Made, publish_stage
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, reopen_cache
from tailrace.storage.display import card, share, table
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.generations import CachePath
from tailrace.storage.tables import write_table

KIND = EvaluationManifest.of_kind
TOKENS = "tokens.parquet"
"""Per-token deltas; the meaning of its columns lies in the file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateResult:
    """A published evaluation."""

    path: Path
    scores: dict[str, SpliceScore]
    """By site, or by sites of a cross-layer transcoder, and of ``all sites`` replaced at once where there are several.
    """

    def _repr_html_(self) -> str:
        first = next(iter(self.scores.values()))
        facts = {"cross entropy of the model": first.ce_original, "predictions": first.n_predictions}
        columns = ("replaced", "cross entropy", "with zeros", "with the mean", "recovered", "KL")
        rows = (
            (
                name,
                score.spliced.ce,
                score.zero.ce,
                score.mean.ce,
                share(score.ce_recovered),
                score.spliced.kl,
            )
            for name, score in self.scores.items()
        )
        return card("Evaluation", facts, table(columns, rows), note=self.path)


def run(
    settings: EvaluateSettings,
    *,
    transcoders: Sequence[Path],
    cache: CachePath,
    output: Path,
    compute: Compute = Compute(),
    model: str | None = None,
) -> EvaluateResult:
    """Publish the evaluation of ``transcoders``, each alone and all at once; return at once if it is there already.

    A folder that holds transcoders stands for all of them, and all layers of a cross-layer transcoder are replaced
    together; ``model`` says where the language model lies if it moved.
    Raises ArtifactMismatch if a transcoder belongs to another model or site, if the model is not the cache's, or if
    another evaluation lies at ``output``; SettingsError if two transcoders replace the same site.
    """
    with reopen_cache(cache, output) as opened:
        split = opened.split(settings.split)
        given = _check_fit(opened, open_transcoders(transcoders))
        digests = {name: {"digest": one.manifest.digest} for name, one in _named(given, "cross-layer").items()}
        inputs = {"cache": opened.reference, "transcoders": digests}

        def make(path: Path) -> Made:
            recorded = open_recorded_model(opened, model=model, device=compute.device_name)
            recorded = _only_learnt(recorded, layers_of(given))
            groups = {name: _open_spliced(recorded, one) for name, one in _named(given, ALL_SITES).items()}
            evaluation = Evaluation(recorded.bridge, groups)
            rows = _evaluate(evaluation, recorded, split, settings, compute.quiet)
            n_rows = write_table(path / TOKENS, TOKEN_SCHEMA, rows)
            record = {
                "model": opened.manifest.model,
                "sites": {layer.site.name: layer.site.as_json() for layer in layers_of(given)},
                "scores": [{"name": name, **score.record()} for name, score in evaluation.scores().items()],
                "tables": {"tokens": {"n_rows": n_rows}},
            }
            return Made(record, [TOKENS], MODEL_LIBRARIES)

        with compute.opened():
            publish_stage(output, KIND, {"settings": settings.model_dump(mode="json"), "inputs": inputs}, make)
        return read_result(output)


def read_result(path: Path) -> EvaluateResult:
    """Return what a published evaluation says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    records = EvaluationManifest.read(path).scores
    return EvaluateResult(path, {record["name"]: SpliceScore.from_record(record) for record in records})


def _only_learnt(recorded: RecordedModel, layers: Sequence[TranscoderLayer]) -> RecordedModel:
    """Return the model with outputs replaced where the cache has rows and each of ``layers`` has learnt.

    A transcoder that does not record its rows is replaced where the cache has some.
    """
    known = [layer for layer in layers if LearntContexts.of(layer.manifest) is not None]
    if not known:
        return recorded
    learnt = LearntTokens(known, recorded.model)

    def mask(tokens: NDArray[Any], documents: NDArray[Any] | None = None, /) -> NDArray[Any]:
        return np.asarray(recorded.row_mask(tokens, documents) & learnt(torch.from_numpy(tokens)).numpy())

    return replace(recorded, row_mask=mask)


def _check_fit(cache: ActivationCache, transcoders: Sequence[PublishedTranscoder]) -> list[PublishedTranscoder]:
    """Return the transcoders in the cache's order of sites.

    Raises ArtifactMismatch with everything that does not fit the cache, SettingsError if two replace one site or none
    is given.
    """
    if not transcoders:
        raise SettingsError("no transcoder to evaluate; give the path of at least one")
    mismatches: dict[str, None] = {}  # layers of one transcoder have the same model
    for layer in layers_of(transcoders):
        try:
            check_same_site(cache, layer)
        except ArtifactMismatch as error:
            mismatches[str(error)] = None
    try:
        layers_by_site(transcoders)
    except SettingsError as error:
        if not mismatches:
            raise
        mismatches[str(error)] = None
    if mismatches:
        raise ArtifactMismatch("\n".join(mismatches))
    order = list(cache.sites)
    return sorted(transcoders, key=lambda one: order.index(one.layers[0].site.name))


def _named(transcoders: Sequence[PublishedTranscoder], of_all: str) -> dict[str, PublishedTranscoder]:
    """Return the transcoders by name; a cross-layer one that is given alone is called ``of_all``."""
    is_all = len(transcoders) == 1 and transcoders[0].is_cross_layer
    return {of_all if is_all else one.name: one for one in transcoders}


def _open_spliced(recorded: RecordedModel, transcoder: PublishedTranscoder) -> list[SplicedSite]:
    """Load a transcoder beside the model, with each site's mean output over the cache's training rows for ablation."""
    train = recorded.cache.split("train")
    return [
        SplicedSite(
            recorded.cache.sites[site.name],
            coder.to(recorded.model.device),
            train.statistics(site.name, "out").mean,
        )
        for site, coder in transcoder.load().items()
    ]


def _evaluate(
    evaluation: Evaluation, recorded: RecordedModel, split: CacheSplit, settings: EvaluateSettings, quiet: bool
) -> Iterator[pa.RecordBatch]:
    """Run the contexts; yield the rows of the table of tokens as they come."""
    contexts = sample_contexts(split, settings.contexts, settings.seed)
    logger.info("running %d %s contexts of %d", len(contexts), split.name, split.n_contexts)
    batches: Iterator[ContextBatch] = recorded.batches(split, contexts, settings.contexts_per_batch)
    with Progress(len(contexts), "evaluate", "contexts", quiet=quiet) as bar:
        for batch in batches:
            with explained_passes(len(batch.contexts)):
                deltas = evaluation.add(batch)
            for one in deltas:
                yield token_rows(one)
            bar.update(len(batch.contexts))
