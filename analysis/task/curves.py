"""How well a task is done with few features: keep the best n and no others, or leave single ones out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.interventions.features import Ablate, Edit, EditedFeatures, EditedNeurons, FeatureCoder, KeepOnly
from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.prompts import Prompts
from tailrace.analysis.splice.replacement import Substitute
from tailrace.analysis.task.answers import CorrectMinusIncorrect
from tailrace.storage.cache_format import Site


class Task:
    """Prompts with their answers, scored on a model with something in place. Runs ``batch`` prompts at a time."""

    def __init__(
        self,
        bridge: Any,
        prompts: Prompts,
        metric: CorrectMinusIncorrect,
        *,
        where: Tensor | None = None,
        batch: int = 64,
    ) -> None:
        assert len(prompts) == len(metric), "every prompt has answers"
        self.bridge, self.prompts, self.metric = bridge, prompts, metric
        self._where, self._batch = where, batch

    def scores(self, substitutes: Mapping[Site, Substitute] | None = None) -> Tensor:
        """Return (prompts,) float64: the metric of each prompt with ``substitutes`` in place."""
        return torch.cat(
            [
                self.metric.part(part)(
                    forward(self.bridge, prompts, substitutes=substitutes, where=self._part_of_where(part, prompts))
                )
                for part, prompts in self.prompts.batches(self._batch)
            ]
        )

    def _part_of_where(self, part: slice, prompts: Prompts) -> Tensor | None:
        """Return ``where`` of some prompts; one row, or one column, is for all."""
        if self._where is None:
            return None
        rows = self._where if len(self._where) == 1 else self._where[part]
        return rows[:, : prompts.tokens.shape[1]]


Coders = Mapping[Site, FeatureCoder]
"""What is put in place together: a transcoder, or the layers of a cross-layer one. Features, and neurons of several
sites, are numbered through, site after site."""


def keep_top_features(task: Task, coders: Coders, order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return (counts, prompts) float64: scores with only the first n features of ``order`` left of the transcoder.

    Its bias (and skip path) stay, so n = 0 is the task without any feature.
    """
    found = []
    for count in counts:
        own = by_site({site: coder.d_sae for site, coder in coders.items()}, order[:count])
        found.append(
            task.scores({site: EditedFeatures(coder, [KeepOnly(own[site])]) for site, coder in coders.items()})
        )
    return torch.stack(found)


def keep_top_neurons(task: Task, neurons: Sequence[Site], order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return (counts, prompts) float64: scores with only the first n neurons of ``order`` left of the MLPs.

    ``neurons`` are sites with an MLP's hidden activations, such as ``blocks.L.mlp.hook_post``, on both sides.
    """
    found = []
    for count in counts:
        own = by_site({site: site.d_out for site in neurons}, order[:count])
        found.append(task.scores({site: EditedNeurons([KeepOnly(own[site])]) for site in neurons}))
    return torch.stack(found)


def leave_one_out(task: Task, coders: Coders, features: Sequence[int], kept: Sequence[int] | None = None) -> Tensor:
    """Return (features, prompts) float64: scores with each of ``features`` alone taken out of the transcoder.

    With ``kept``, out of the transcoder of which only these features are left.
    """
    sizes = {site: coder.d_sae for site, coder in coders.items()}
    first = None if kept is None else by_site(sizes, kept)
    found = []
    for feature in features:
        out = by_site(sizes, [feature])
        edits: dict[Site, list[Edit]] = {site: [] if first is None else [KeepOnly(first[site])] for site in coders}
        for site, own in out.items():
            edits[site] += [Ablate(own)] if own else []
        found.append(task.scores({site: EditedFeatures(coder, edits[site]) for site, coder in coders.items()}))
    return torch.stack(found)


def by_site(sizes: Mapping[Site, int], numbers: Sequence[int]) -> dict[Site, tuple[int, ...]]:
    """Return each site's own of features, or neurons, that are numbered through; ``sizes`` has how many each has."""
    found, start = {}, 0
    for site, size in sizes.items():
        found[site] = tuple(number - start for number in numbers if start <= number < start + size)
        start += size
    return found
