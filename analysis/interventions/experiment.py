"""Which places carry what makes two prompts differ: values of one run patched into the other, place by place.

Both runs, and every patched one, are made here and inside the same replacement, so the difference between a model and
its transcoders is on both sides and cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.metrics import Metric
from tailrace.analysis.interventions.patching import Patch
from tailrace.analysis.interventions.prompts import Prompts
from tailrace.analysis.splice.hook_points import name_problem
from tailrace.analysis.splice.replacement import Substitute
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError, TextError


class PatchPlace(NamedTuple):
    """Where to patch."""

    hook: str
    """``NAME`` or ``NAME[head]``; see ``tailrace.analysis.interventions.patching.hook_of``."""
    position: int | None = None
    """Position in every prompt, negative ones from its end; None: all of them."""
    also: tuple[str, ...] = ()
    """Hooks patched together with it, at the same position: a head's values beside its keys, for instance."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hooks patched."""
        return (self.hook, *self.also)


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """A metric before, after, and with each place patched."""

    places: tuple[PatchPlace, ...]
    source: Tensor
    """(prompts,) float64: the metric of the prompts that values are taken from."""
    target: Tensor
    """(prompts,) float64: of the prompts that they are put into."""
    patched: Tensor
    """(places, prompts) float64: of the target with one place patched."""

    def restored(self) -> Tensor:
        """Return (places, prompts) float64 (patched − target) / (source − target): 0 changes nothing, 1 is the source.

        NaN for prompts whose metric is the same in both.
        """
        gap = self.source - self.target
        return (self.patched - self.target) / torch.where(gap == 0, torch.nan, gap)


def patching_effects(
    bridge: Any,
    *,
    source: Prompts,
    target: Prompts,
    places: Sequence[PatchPlace],
    metric: Metric,
    substitutes: Mapping[Site, Substitute] | None = None,
    where: Tensor | None = None,
) -> PatchingResult:
    """Run ``target`` once per place with the values that ``source`` has there, inside ``substitutes`` throughout.

    Prompts are paired by their order. Raises TextError, naming every pair, unless both of each pair have as many
    tokens, and ModelError for hooks that the model does not have.
    """
    _check_pairs(source, target)
    points = bridge.hook_dict
    hooks = {hook: HookName.parse(hook).point for place in places for hook in place.hooks}
    if problems := [problem for name in hooks if (problem := name_problem(name, points)) is not None]:
        raise ModelError("cannot patch what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    before = forward(bridge, source, substitutes=substitutes, hooks=[*hooks.values(), *metric.hooks], where=where)
    after = forward(bridge, target, substitutes=substitutes, hooks=metric.hooks, where=where)
    patched = []
    for place in places:
        positions = target.is_token if place.position is None else target.at(place.position)
        patches = [Patch(hook, before.observed[hooks[hook]], positions) for hook in place.hooks]
        run = forward(bridge, target, substitutes=substitutes, patches=patches, hooks=metric.hooks, where=where)
        patched.append(metric(run))
    n_prompts = len(target)
    return PatchingResult(
        tuple(places),
        metric(before),
        metric(after),
        torch.stack(patched) if patched else torch.empty(0, n_prompts, dtype=torch.float64),
    )


def _check_pairs(source: Prompts, target: Prompts) -> None:
    if len(source) != len(target):
        raise TextError(
            f"{len(source)} prompts to take values from and {len(target)} to put them into; they are paired by order, "
            "so give as many of each"
        )
    pairs = zip(source.lengths.tolist(), target.lengths.tolist(), strict=True)
    unequal = [f"pair {index}: {one} and {other} tokens" for index, (one, other) in enumerate(pairs) if one != other]
    if unequal:
        raise TextError(
            "values are patched position by position, so both prompts of a pair need as many tokens:\n"
            + "\n".join(f"  {line}" for line in unequal)
        )
