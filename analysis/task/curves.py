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
                self.metric.part(part)(forward(self.bridge, prompts, substitutes=substitutes, where=self._where))
                for part, prompts in self.prompts.batches(self._batch)
            ]
        )


def keep_top_features(
    task: Task, site: Site, coder: FeatureCoder, order: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Return (counts, prompts) float64: scores with only the first n features of ``order`` left of the transcoder.

    Its bias (and skip path) stay, so n = 0 is the task without any feature.
    """
    return torch.stack(
        [task.scores({site: EditedFeatures(coder, [KeepOnly(tuple(order[:count]))])}) for count in counts]
    )


def keep_top_neurons(task: Task, neurons: Site, order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return (counts, prompts) float64: scores with only the first n neurons of ``order`` left of the MLP.

    ``neurons`` is a site with an MLP's hidden activations, such as ``blocks.L.mlp.hook_post``, on both sides.
    """
    return torch.stack([task.scores({neurons: EditedNeurons([KeepOnly(tuple(order[:count]))])}) for count in counts])


def leave_one_out(
    task: Task, site: Site, coder: FeatureCoder, features: Sequence[int], kept: Sequence[int] | None = None
) -> Tensor:
    """Return (features, prompts) float64: scores with each of ``features`` alone taken out of the transcoder.

    With ``kept``, out of the transcoder of which only these features are left.
    """
    first: list[Edit] = [] if kept is None else [KeepOnly(tuple(kept))]
    return torch.stack(
        [task.scores({site: EditedFeatures(coder, [*first, Ablate((feature,))])}) for feature in features]
    )
