"""One forward pass with everything in place: substitutes, patches, and hooks to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tailrace.analysis.interventions.patching import Patch, patched
from tailrace.analysis.interventions.prompts import Prompts
from tailrace.analysis.splice.hook_points import name_problem, observed
from tailrace.analysis.splice.passes import check_whole
from tailrace.analysis.splice.replacement import Substitute, replaced, silent_sites_problem, tensor_in
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What a run of prompts gave. Tensors of another run do not touch it: they are copies."""

    prompts: Prompts
    logits: Tensor
    """(prompts, positions, vocab)."""
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    """What the hooks asked for held, by name."""

    @property
    def last_logits(self) -> Tensor:
        """(prompts, vocab) at each prompt's own last token."""
        return self.prompts.at_last(self.logits)


@torch.inference_mode()
def forward(
    bridge: Any,
    prompts: Prompts,
    *,
    substitutes: Mapping[Site, Substitute] | None = None,
    patches: Sequence[Patch] = (),
    hooks: Sequence[str] = (),
    where: Tensor | None = None,
) -> ForwardPass:
    """Run ``prompts`` with ``substitutes`` and ``patches`` in place; patches act on what substitutes left.

    ``hooks`` are looked at last, so they hold what the model went on with. ``where`` is that of
    ``tailrace.analysis.splice.replacement.replaced``. Raises ModelError for unknown hooks, and for a hook that never
    fired.
    """
    points: Mapping[str, Any] = bridge.hook_dict
    names = list(dict.fromkeys(hooks))
    if problems := [problem for name in names if (problem := name_problem(name, points)) is not None]:
        raise ModelError("cannot look at what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    check_whole(where, prompts.tokens)
    prompts = prompts.to(next(bridge.original_model.parameters()).device)
    with (
        replaced(bridge, substitutes or {}, where=where) as replacement,
        patched(bridge, patches) as patching,
        observed(points, names) as seen,
    ):
        if longer := [patch for patch in patches if patch.n_positions > prompts.tokens.shape[1]]:
            raise ModelError(
                f"{longer[0].hook}: values of {longer[0].n_positions} positions, the prompts have "
                f"{prompts.tokens.shape[1]}; both runs need the same number of prompts of the same lengths"
            )
        logits: Tensor = bridge(prompts.tokens, return_type="logits", use_cache=False)
    silent = [*patching.silent_hooks(), *(name for name in names if name not in seen)]
    if replacement.silent_sites():
        raise ModelError(silent_sites_problem(replacement.silent_sites()))
    if silent:
        raise ModelError(
            f"hooks {', '.join(silent)} never fired in this pass; TransformerLens leaves some hooks off, choose others"
        )
    return ForwardPass(prompts, logits, {name: tensor_in(value).clone() for name, value in seen.items()})
