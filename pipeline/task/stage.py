"""The stage ``pipeline task``: how few of a transcoder's features a model needs for a task, and which.

Prompts with correct and incorrect answers are run with the transcoder in place of its MLP; features are ranked by how
much they vary over the prompts, kept a few at a time, and left out one by one. MLP neurons are ranked and kept the same
way, to compare with. Outputs are replaced everywhere but at the BOS, in every run alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Transcoded
from tailrace.analysis.task.answers import CorrectMinusIncorrect
from tailrace.analysis.task.curves import Task, keep_top_features, keep_top_neurons, leave_one_out
from tailrace.analysis.task.ranking import last_activations, last_neurons, rank_by_variance
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.unembedding import logit_effects
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.shared.device import limited_threads, open_device
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
from tailrace.storage.artifact import MANIFEST, digest, read_manifest
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.tables import read_table, write_table
from tailrace.training.architectures.transcoder import KIND as TRANSCODER_KIND
from tailrace.training.architectures.transcoder import Transcoder, load_transcoder, read_transcoder_manifest

KIND = "task"
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]


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
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
) -> TaskResult:
    """Publish what ``transcoders``, each alone, do for the task in ``prompts``; return at once if it is there already.

    A folder that holds transcoders stands for all of them. ``model`` says where the language model lies if it moved.
    Raises TextError with every problem of the prompts, SettingsError if two transcoders replace one site, and the
    errors of opening transcoders and model.
    """
    transcoders = each_artifact(transcoders, TRANSCODER_KIND)
    sites = _sites(transcoders)
    lines = read_lines(prompts)
    open_device(device)
    request = {
        "format": FORMAT_VERSION,
        "settings": settings.model_dump(mode="json"),
        "inputs": {
            "prompts": {"digest": digest([value for _, value in lines])},
            "transcoders": {site.name: {"digest": made["digest"]} for site, _, made in sites},
        },
    }
    work = None
    if not (output / MANIFEST).exists():
        # Prompts that turn out wrong leave no draft behind, which would refuse the corrected ones.
        loaded = open_transcoder_model(transcoders, model=model, device=device)
        read = tokenized(prompts, lines, loaded.tokenize, loaded.bos_token_id, loaded.max_context_length)
        work = _Work(settings, loaded, read, quiet)
    with limited_threads(threads), Draft(output, KIND, request) as draft:
        if work is not None and not draft.published:
            work.publish(draft, sites)
    return read_result(output)


def read_result(path: Path) -> TaskResult:
    """Return what a published task says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    read_manifest(path, KIND)
    curves = [Curve(**row) for row in read_table(path / f"{CURVES}.parquet").to_pylist()]
    return TaskResult(path, curves, [Ranked(**row) for row in read_table(path / f"{RANKING}.parquet").to_pylist()])


def _sites(transcoders: Sequence[Path]) -> list[tuple[Site, Path, dict[str, Any]]]:
    found: dict[str, tuple[Site, Path, dict[str, Any]]] = {}
    problems = []
    for path in transcoders:
        made = read_transcoder_manifest(path)
        site = Site(**made["site"])
        if site.name in found:
            problems.append(f"{path} and {found[site.name][1]} both replace site {site.name}; leave one out")
        found.setdefault(site.name, (site, path, made))
    if problems:
        raise SettingsError("\n".join(problems))
    return list(found.values())


class _Work:
    """The task on an opened model."""

    def __init__(self, settings: TaskSettings, model: LanguageModel, read: TaskPrompts, quiet: bool) -> None:
        self.metric = CorrectMinusIncorrect(read.correct, read.incorrect)
        self._settings, self._model, self._read, self._quiet = settings, model, read, quiet
        self._prompts = pad_prompts(read.tokens, model.device)
        self._task = Task(model.bridge, self._prompts, self.metric, batch=settings.prompts_per_batch)
        self._weights: ModelWeights = read_weights(model)

    @torch.inference_mode()
    def publish(self, draft: Draft, sites: Sequence[tuple[Site, Path, dict[str, Any]]]) -> None:
        """Measure everything and publish it."""
        curves, ranking = [_curve(None, MODEL, None, self._task.scores())], []
        for site, path, _ in sites:
            found = self._site(site, load_transcoder(path).to(self._model.device))
            curves += found[0]
            ranking += found[1]
        _write(draft, self._model, self.metric.tokens, self._read, curves, ranking)

    def _site(self, site: Site, coder: Transcoder) -> tuple[list[Curve], list[Ranked]]:
        """Return curves and ranking of one transcoder."""
        batch = self._settings.prompts_per_batch
        features = rank_by_variance(last_activations(self._model.bridge, self._prompts, site, coder, batch))
        curves = [_curve(site.name, TRANSCODER, None, self._task.scores({site: Transcoded(coder)}))]
        counts = [count for count in self._settings.kept if count <= coder.d_sae]
        order = features.order.tolist()
        for count in self._shown(counts, f"{site.name}: features kept"):
            scores = keep_top_features(self._task, site, coder, order, [count])[0]
            curves.append(_curve(site.name, FEATURES, count, scores))
        shown = order[: max([*counts, self._settings.leave_out])]
        without = {
            feature: float(leave_one_out(self._task, site, coder, [feature])[0].mean())
            for feature in self._shown(order[: self._settings.leave_out], f"{site.name}: features left out")
        }
        effects = logit_effects(coder.W_dec[shown], self._weights, self.metric.tokens)
        ranking = [
            _ranked(site.name, FEATURES, rank, feature, features, without.get(feature), effects[rank])
            for rank, feature in enumerate(shown)
        ]
        if (neurons := self._neurons(site)) is not None:
            varied = rank_by_variance(last_neurons(self._model.bridge, self._prompts, neurons.hook_out, batch))
            order = varied.order.tolist()
            for count in self._shown([n for n in self._settings.kept if n <= len(order)], f"{site.name}: neurons kept"):
                curves.append(
                    _curve(site.name, NEURONS, count, keep_top_neurons(self._task, neurons, order, [count])[0])
                )
            ranking += [
                _ranked(site.name, NEURONS, rank, neuron, varied, None, None)
                for rank, neuron in enumerate(order[: len(shown)])
            ]
        return curves, ranking

    def _neurons(self, site: Site) -> Site | None:
        """Return the hidden activations of the MLP that a transcoder of ``site`` replaces; None if it replaces none."""
        match = re.fullmatch(r"(blocks\.\d+\.mlp)\.hook_out", site.hook_out)
        hook = f"{match[1]}.hook_post" if match else ""
        if hook not in self._model.bridge.hook_dict:
            return None
        width, _ = self._model.widths([SiteHooks(hook, hook, hook)])[hook]
        return Site(f"{site.name} neurons", hook, hook, width, width, "float32")

    def _shown(self, values: Sequence[int], what: str) -> Iterator[int]:
        return iter(tqdm(values, desc=what, unit="run", disable=True if self._quiet else None))


def _curve(site: str | None, kind: str, n_kept: int | None, scores: Tensor) -> Curve:
    return Curve(site, kind, n_kept, float(scores.mean()), scores.tolist())


def _ranked(
    site: str, kind: str, rank: int, index: int, found: Any, without: float | None, effects: Tensor | None
) -> Ranked:
    return Ranked(
        site=site,
        kind=kind,
        rank=rank,
        index=index,
        mean=float(found.mean[index]),
        variance=float(found.variance[index]),
        n_active=int(found.n_active[index]),
        score_without=without,
        answer_effects=None if effects is None else effects.tolist(),
    )


def _write(
    draft: Draft,
    model: LanguageModel,
    answers: Sequence[int],
    read: TaskPrompts,
    curves: Sequence[Curve],
    ranking: Sequence[Ranked],
) -> None:
    vocabulary = model.vocabulary()
    tables = {
        PROMPTS: prompts_batch(read.texts, read.tokens, read.correct, read.incorrect),
        CURVES: curves_batch(curves),
        RANKING: ranking_batch(ranking),
    }
    for name, batch in tables.items():
        write_table(draft.path / f"{name}.parquet", schema_of(name), [batch])
    draft.publish(
        {
            "format": FORMAT_VERSION,
            "inputs": draft.request["inputs"],
            "model": model.identity(),
            "answers": [{"token_id": token, "token": vocabulary[token]} for token in answers],
            "tables": {name: {"n_rows": batch.num_rows} for name, batch in tables.items()},
        },
        [f"{name}.parquet" for name in tables],
    )
