"""The stage ``pipeline task``: how few of a transcoder's features a model needs for a task, and which.

Prompts with correct and incorrect answers are run with the transcoder in place of its MLP; features are ranked by how
much they vary over the prompts, kept a few at a time, and left out one by one. MLP neurons are ranked and kept the same
way, to compare with. Outputs are replaced at the tokens that the transcoder has learnt from, in every run alike.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Transcoded
from tailrace.analysis.task.answers import CorrectMinusIncorrect
from tailrace.analysis.task.curves import Task, by_site, keep_top_features, keep_top_neurons, leave_one_out
from tailrace.analysis.task.ranking import Ranking, last_activations, last_neurons, rank_by_variance
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import write_point
from tailrace.analysis.weights.unembedding import logit_effects
from tailrace.pipeline.artifacts.manifests import TaskManifest
from tailrace.pipeline.artifacts.transcoders import PublishedTranscoder, layers_by_site, open_transcoders
from tailrace.pipeline.cache.learnt_rows import LearntTokens
from tailrace.pipeline.model.checks import has_neurons
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.stage import MODEL_LIBRARIES, Made, publish_stage
from tailrace.pipeline.task.prompts import TaskPrompts, read_lines, tokenized
from tailrace.pipeline.task.settings import TaskSettings
from tailrace.pipeline.task.tables import (
    CURVES,
    FEATURES,
    MODEL,
    NEURONS,
    PROMPTS,
    RANKING,
    TRANSCODER,
    Curve,
    Ranked,
    curves_batch,
    prompts_batch,
    ranking_batch,
    schema_of,
)
from tailrace.storage.artifact import digest
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError, OutOfMemoryError
from tailrace.storage.tables import read_table, write_table
from tailrace.training.architectures.transcoder import Transcoder
from tailrace.training.cross_layer.layers import StackedLayer

KIND = TaskManifest.of_kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """A published task."""

    path: Path
    curves: list[Curve]
    ranking: list[Ranked]


def run(
    settings: TaskSettings,
    *,
    prompts: Path,
    transcoders: Sequence[Path],
    output: Path,
    model: str | None = None,
    compute: Compute = Compute(),
) -> TaskResult:
    """Publish what ``transcoders``, each alone, do for the task in ``prompts``; return at once if it is there already.

    A folder that holds transcoders stands for all of them; a cross-layer transcoder is put in place at all its layers
    together, and its features of all layers are ranked together. ``model`` says where the language model lies if it
    moved.
    Raises TextError with every problem of the prompts, SettingsError if two transcoders replace one site, and the
    errors of opening transcoders and model.
    """
    given = open_transcoders(transcoders)
    layers_by_site(given)
    lines = read_lines(prompts)
    request = {
        "settings": settings.model_dump(mode="json"),
        "inputs": {
            "prompts": {"digest": digest([value for _, value in lines])},
            "transcoders": {one.name: {"digest": one.manifest.digest} for one in given},
        },
    }

    def make(path: Path) -> Made:
        loaded = open_transcoder_model([one.path for one in given], model=model, device=compute.device_name)
        read = tokenized(prompts, lines, loaded)
        return _Work(settings, loaded, read, compute.quiet).write(path, given)

    with compute.opened():
        publish_stage(output, KIND, request, make)
    return read_result(output)


def read_result(path: Path) -> TaskResult:
    """Return what a published task says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    TaskManifest.read(path)
    curves = [Curve(**row) for row in read_table(path / f"{CURVES}.parquet").to_pylist()]
    return TaskResult(path, curves, [Ranked(**row) for row in read_table(path / f"{RANKING}.parquet").to_pylist()])


class _Work:
    """The task on an opened model."""

    def __init__(self, settings: TaskSettings, model: LanguageModel, read: TaskPrompts, quiet: bool) -> None:
        self.metric = CorrectMinusIncorrect(read.correct, read.incorrect)
        self._settings, self._model, self._read, self._quiet = settings, model, read, quiet
        self._prompts = pad_prompts(read.tokens, model.device)
        self._weights = _weights_if_readable(model)

    @torch.inference_mode()
    def write(self, path: Path, transcoders: Sequence[PublishedTranscoder]) -> Made:
        """Measure everything and write it into the directory ``path``."""
        curves, ranking = [_curve(None, MODEL, None, self._task_of(None).scores())], []
        for one in transcoders:
            coders = {site: coder.to(self._model.device) for site, coder in one.load().items()}
            found = self._measure(one, coders)
            curves += found[0]
            ranking += found[1]
        return _write(path, self._model, self.metric.tokens, self._read, curves, ranking)

    def _task_of(self, transcoder: PublishedTranscoder | None) -> Task:
        """Return the task with outputs replaced where a transcoder has learnt, in every run alike."""
        where = None
        if transcoder is not None:
            where = LearntTokens(transcoder.layers, self._model)(self._prompts.tokens)
            ends = self._prompts.at_last(where)
            if not bool(ends.all()):
                logger.warning(
                    "%s: %d of %d prompts end at a token that it has not learnt from; there the model's own output "
                    "stays, and its features are ranked by what they would be",
                    *(transcoder.path, int((~ends).sum()), len(ends)),
                )
        return Task(self._model.bridge, self._prompts, self.metric, where=where, batch=self._settings.prompts_per_batch)

    def _measure(
        self, transcoder: PublishedTranscoder, coders: dict[Site, Transcoder]
    ) -> tuple[list[Curve], list[Ranked]]:
        """Return curves and ranking of one transcoder, given as its layers."""
        name, task, batch = transcoder.name, self._task_of(transcoder), self._settings.prompts_per_batch
        features = rank_by_variance(last_activations(self._model.bridge, self._prompts, coders, batch))
        in_place = {site: Transcoded(coder) for site, coder in coders.items()}
        curves = [_curve(name, TRANSCODER, None, task.scores(in_place))]
        order = features.order.tolist()
        counts = [count for count in self._settings.kept if count <= len(order)]
        for count in self._shown(counts, f"{name}: features kept"):
            scores = keep_top_features(task, coders, order, [count])[0]
            curves.append(_curve(name, FEATURES, count, scores))
        shown = order[: max([*counts, self._settings.leave_out])]
        without = {
            feature: float(leave_one_out(task, coders, [feature])[0].mean())
            for feature in self._shown(order[: self._settings.leave_out], f"{name}: features left out")
        }
        sizes = {site: coder.d_sae for site, coder in coders.items()}
        places = [_place(sizes, feature) for feature in shown]
        effects = self._effects(coders, places)
        ranking = [
            _ranked(place, FEATURES, rank, feature, features, without.get(feature), effects[rank])
            for rank, (place, feature) in enumerate(zip(places, shown, strict=True))
        ]
        if neurons := self._neurons(list(coders)):
            hooks = [one.hook_out for one in neurons.values()]
            varied = rank_by_variance(last_neurons(self._model.bridge, self._prompts, hooks, batch))
            order = varied.order.tolist()
            for count in self._shown([n for n in self._settings.kept if n <= len(order)], f"{name}: neurons kept"):
                scores = keep_top_neurons(task, list(neurons.values()), order, [count])[0]
                curves.append(_curve(name, NEURONS, count, scores))
            owners = {own: site for site, own in neurons.items()}
            for rank, neuron in enumerate(order[: len(shown)]):
                own, index = _place({one: one.d_out for one in owners}, neuron)
                ranking.append(_ranked((owners[own], index), NEURONS, rank, neuron, varied, None, None))
        return curves, ranking

    def _neurons(self, sites: Sequence[Site]) -> dict[Site, Site]:
        """Return the hidden activations of the MLP that is replaced at each of ``sites``; none if one shows none."""
        found = {}
        for site in sites:
            match = re.fullmatch(r"(blocks\.\d+\.mlp)\.hook_out", site.hook_out)
            hook = f"{match[1]}.hook_post" if match else ""
            if not has_neurons(hook, self._model.bridge.hook_dict):
                return {}
            width, _ = self._model.widths([SiteHooks(hook, hook, hook)])[hook]
            found[site] = Site(f"{site.name} neurons", hook, hook, width, width, "float32")
        return found

    def _effects(
        self, coders: Mapping[Site, Transcoder], features: Sequence[tuple[Site, int]]
    ) -> Sequence[Tensor | None]:
        """Return each feature's effects (answers,) on the answers' logits; None where weights do not tell them."""
        if self._weights is None or not features:
            return [None] * len(features)
        written = [_written(coders, feature, self._weights) for feature in features]
        rows = [row for row in written if row is not None]
        if len(rows) < len(features):
            return [None] * len(features)
        return list(logit_effects(torch.stack(rows), self._weights, self.metric.tokens))

    def _shown(self, values: Sequence[int], what: str) -> Iterator[int]:
        return Progress(len(values), what, "runs", quiet=self._quiet).of(values)


def _place(sizes: Mapping[Site, int], number: int) -> tuple[Site, int]:
    """Return the site, and the number there, of a feature or neuron that is numbered through."""
    ((site, index),) = ((site, own[0]) for site, own in by_site(sizes, [number]).items() if own)
    return site, index


def _weights_if_readable(model: LanguageModel) -> ModelWeights | None:
    """Return the model's weights; None, with a warning, for a family in which they do not tell what features do."""
    try:
        return read_weights(model)
    except OutOfMemoryError:
        raise
    except ModelError as error:
        logger.warning("effects on answers are left out of the ranking: %s", error)
        return None


def _written(coders: Mapping[Site, Transcoder], feature: tuple[Site, int], weights: ModelWeights) -> Tensor | None:
    """Return (d_model,) what a feature adds to the stream, in all layers together; None if not to the stream."""
    site, index = feature
    coder = coders[site]
    rows = {site: coder.W_dec[index]}
    if isinstance(coder, StackedLayer):
        rows |= {coder.sites[target]: coder.writes_to(target)[index] for target in coder.later}
    points = {at: write_point(at.hook_out, weights) for at in rows}
    carried = [point.carry(rows[at]) for at, point in points.items() if point is not None]
    return torch.stack(carried).sum(0) if len(carried) == len(rows) else None


def _curve(site: str | None, kind: str, n_kept: int | None, scores: Tensor) -> Curve:
    return Curve(site, kind, n_kept, float(scores.mean()), scores.tolist())


def _ranked(
    place: tuple[Site, int],
    kind: str,
    rank: int,
    number: int,
    found: Ranking,
    without: float | None,
    effects: Tensor | None,
) -> Ranked:
    """Return a feature or neuron at a site, whose ``number`` counts through all sites."""
    return Ranked(
        site=place[0].name,
        kind=kind,
        rank=rank,
        index=place[1],
        mean=float(found.mean[number]),
        variance=float(found.variance[number]),
        n_active=int(found.n_active[number]),
        score_without=without,
        answer_effects=None if effects is None else effects.tolist(),
    )


def _write(
    path: Path,
    model: LanguageModel,
    answers: Sequence[int],
    read: TaskPrompts,
    curves: Sequence[Curve],
    ranking: Sequence[Ranked],
) -> Made:
    vocabulary = model.vocabulary()
    tables = {
        PROMPTS: prompts_batch(read.texts, read.tokens, read.correct, read.incorrect),
        CURVES: curves_batch(curves),
        RANKING: ranking_batch(ranking),
    }
    for name, batch in tables.items():
        write_table(path / f"{name}.parquet", schema_of(name), [batch])
    record = {
        "model": model.identity(),
        "answers": [{"token_id": token, "token": vocabulary[token]} for token in answers],
        "tables": {name: {"n_rows": batch.num_rows} for name, batch in tables.items()},
    }
    return Made(record, [f"{name}.parquet" for name in tables], MODEL_LIBRARIES)
