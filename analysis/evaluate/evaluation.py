"""Evaluation of a language model whose MLPs are replaced by transcoders: cross entropy recovered, KL, FVU, L0.

Every context is run as it is (original), with the transcoders in place (spliced), and with the same sites ablated to
zero and to their mean; once for each transcoder alone, and once for all of them together. All numbers are nats per
prediction, over every prediction of every context: the one made at position t is of the token at t + 1.

What is ablated or replaced is a site's *output*, at the same positions in all runs. Replacing the input hook, or
ablating every head where the site is a single head, gives numbers that look alike and mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.evaluate.next_tokens import next_token_divergences, next_token_losses, pattern_divergences
from tailrace.analysis.evaluate.splice_scores import Outcome, SpliceScore
from tailrace.analysis.harvest.table import record_batch
from tailrace.analysis.splice.hook_points import observed
from tailrace.analysis.splice.in_place import InPlaceSums, Measured
from tailrace.analysis.splice.replacement import InPlaceCoder, MeanAblated, Substitute, ZeroAblated, run_replaced
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import NonFiniteActivation
from tailrace.storage.tables import column

ALL_SITES = "all sites"
"""Name of the set of every site; no site can be called that, since names have no spaces."""

_QUERIES_OR_KEYS = re.compile(r"(blocks\.\d+\.attn)\.(?:hook_(?:rot_)?[qk]|[qk]\.hook_out)")
TOKEN_SCHEMA = pa.schema(
    [
        column("sites", pa.string(), "the site that is replaced, or 'all sites' for all of them together"),
        column("context", pa.uint32(), "context of the cache's split"),
        column("position", pa.int32(), "position the prediction is made at, within the context", unit="tokens"),
        column("token_id", pa.int32(), "token at that position"),
        column("next_token_id", pa.int32(), "token at the next position, the one to be predicted"),
        column(
            "replaced", pa.bool_(), "whether outputs at this position are replaced; elsewhere only earlier ones are"
        ),
        column("ce_original", pa.float64(), "−log p(next token) of the model itself", unit="nats"),
        column("ce_spliced", pa.float64(), "−log p(next token) with transcoders in place", unit="nats"),
        column("delta", pa.float64(), "ce_spliced − ce_original", unit="nats"),
        column("kl", pa.float64(), "KL(original ‖ spliced) of the distributions of the next token", unit="nats"),
    ]
)


@dataclass(frozen=True, eq=False)
class SplicedSite:
    """A site, the coder that replaces it, and its mean output for ablation (d_out,)."""

    site: Site
    coder: InPlaceCoder
    mean_output: NDArray[np.float64]


class ContextBatch(NamedTuple):
    """Contexts to evaluate on."""

    contexts: NDArray[np.int64]
    """(n,) their ids."""
    tokens: Tensor
    """(n, positions) int64, on the model's device."""
    where: Tensor
    """(n, positions) bool: where outputs are replaced, which is where a cache has rows."""


class TokenDeltas(NamedTuple):
    """The effect of splicing on each prediction of a batch; arrays of (n · (positions − 1),), context by context."""

    sites: str
    context: NDArray[np.int64]
    position: NDArray[np.int64]
    token_id: NDArray[np.int64]
    next_token_id: NDArray[np.int64]
    replaced: NDArray[np.bool_]
    ce_original: NDArray[np.float64]
    ce_spliced: NDArray[np.float64]
    kl: NDArray[np.float64]


class Evaluation:
    """Scores a set of sites on a model, batch by batch. Memory: two batches of logits, (n, positions, vocab) each.

    ``groups`` are the sites that are replaced together, by a name: a transcoder's, several of a cross-layer one.
    """

    def __init__(self, bridge: Any, groups: Mapping[str, Sequence[SplicedSite]]) -> None:
        self._bridge = bridge
        spliced = [one for group in groups.values() for one in group]
        self._patterns: dict[str, _SitePattern] = {
            member.site.name: pattern
            for member in spliced
            if (pattern := _pattern_of(member.site, bridge.hook_dict)) is not None
        }
        self._sets = [_SetSums(name, group) for name, group in groups.items()]
        if len(groups) > 1:
            self._sets.append(_SetSums(ALL_SITES, spliced))

    @torch.inference_mode()
    def add(self, batch: ContextBatch) -> list[TokenDeltas]:
        """Run a batch and count it; return the deltas of each group, then those of all together.

        Raises ModelError for hooks that the model does not have or that never fire, and NonFiniteActivation where the
        spliced model predicts nothing.
        """
        original, patterns = self._run(batch.tokens, {}, batch.where)
        losses = next_token_losses(original, batch.tokens)
        deltas = []
        for sums in self._sets:
            kinds: dict[str, dict[Site, Substitute]] = {
                "spliced": sums.measured(batch.where),
                "zero": {member.site: ZeroAblated() for member in sums.members},
                "mean": {member.site: MeanAblated(member.mean_output) for member in sums.members},
            }
            for kind, substitutes in kinds.items():
                logits, changed = self._run(batch.tokens, substitutes, batch.where)
                after = next_token_losses(logits, batch.tokens)
                refuse_nonfinite(after, f"{sums.name}, {kind}", batch.contexts)
                divergences = next_token_divergences(original, logits)
                sums.kinds[kind].add(after, divergences, self._pattern_sums(sums, patterns, changed))
                if kind == "spliced":
                    sums.add(losses, after)
                    deltas.append(_deltas(sums.name, batch, losses, after, divergences))
                del logits, changed  # before the next run, so that no third batch of logits is held
        return deltas

    def scores(self) -> dict[str, SpliceScore]:
        """Return the scores over all batches so far, by group, and of ``ALL_SITES`` where there are several."""
        return {sums.name: sums.score() for sums in self._sets}

    def _run(
        self, tokens: Tensor, substitutes: Mapping[Site, Substitute], where: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and the attention patterns that some site is scored by."""
        hooks = sorted({hook for pattern in self._patterns.values() for hook in pattern.hooks})
        with observed(self._bridge.hook_dict, hooks) as patterns:
            return run_replaced(self._bridge, tokens, substitutes, where), patterns

    def _pattern_sums(
        self, sums: _SetSums, original: Mapping[str, Tensor], changed: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, int]]:
        sums_by_site = {}
        for member in sums.members:
            if (pattern := self._patterns.get(member.site.name)) is not None:
                divergences = pattern.divergences(original, changed)
                sums_by_site[member.site.name] = (float(divergences.sum()), divergences.numel())
        return sums_by_site


def refuse_nonfinite(losses: Tensor, what: str, contexts: NDArray[np.int64]) -> None:
    """Raise NonFiniteActivation, naming ``what`` was run and the context, if a loss (contexts, …) is not finite."""
    finite = torch.isfinite(losses).all(1)
    if not finite.all():
        context = int(contexts[int((~finite).int().argmax())])
        raise NonFiniteActivation(
            f"{what}: the loss of context {context} is not finite. The transcoder, or the model in its dtype, "
            "overflows; run `pipeline verify` on both, and if they are sound, train with a lower learning rate"
        )


class _KindSums:
    """Sums over predictions of one kind of replacement."""

    def __init__(self) -> None:
        self.n = 0
        self._loss = self._divergence = 0.0
        self._patterns: dict[str, tuple[float, int]] = {}

    def add(self, losses: Tensor, divergences: Tensor, patterns: Mapping[str, tuple[float, int]]) -> None:
        self.n += losses.numel()
        self._loss += float(losses.sum())
        self._divergence += float(divergences.sum())
        for name, (total, count) in patterns.items():
            before, n_before = self._patterns.get(name, (0.0, 0))
            self._patterns[name] = (before + total, n_before + count)

    def outcome(self) -> Outcome:
        patterns = {name: total / count for name, (total, count) in self._patterns.items()}
        return Outcome(self._loss / self.n, self._divergence / self.n, patterns)


class _SetSums:
    """Sums of a set of sites over all batches, for every kind of replacement."""

    def __init__(self, name: str, members: Sequence[SplicedSite]) -> None:
        self.name, self.members = name, members
        self.kinds = {kind: _KindSums() for kind in ("spliced", "zero", "mean")}
        self._in_place = {member.site.name: InPlaceSums(member.mean_output) for member in members}
        self._original = 0.0
        self._increases: list[float] = []

    def measured(self, where: Tensor) -> dict[Site, Substitute]:
        return {member.site: Measured(member.coder, self._in_place[member.site.name], where) for member in self.members}

    def add(self, original: Tensor, spliced: Tensor) -> None:
        self._original += float(original.sum())
        self._increases += (spliced - original).mean(1).tolist()

    def score(self) -> SpliceScore:
        n_contexts, n = len(self._increases), self.kinds["spliced"].n
        assert n > 0, "there is at least one context"
        spread = float(np.std(self._increases, ddof=1)) if n_contexts > 1 else None
        return SpliceScore(
            sites=tuple(member.site.name for member in self.members),
            n_contexts=n_contexts,
            n_predictions=n,
            ce_original=self._original / n,
            spliced=self.kinds["spliced"].outcome(),
            zero=self.kinds["zero"].outcome(),
            mean=self.kinds["mean"].outcome(),
            ce_increase_error=None if spread is None else spread / n_contexts**0.5,
            in_place={name: sums.score() for name, sums in self._in_place.items()},
        )


def _deltas(name: str, batch: ContextBatch, before: Tensor, after: Tensor, divergences: Tensor) -> TokenDeltas:
    n_contexts, n_predictions = before.shape
    tokens = batch.tokens.cpu().numpy()
    return TokenDeltas(
        sites=name,
        context=np.repeat(batch.contexts, n_predictions),
        position=np.tile(np.arange(n_predictions), n_contexts),
        token_id=tokens[:, :-1].ravel(),
        next_token_id=tokens[:, 1:].ravel(),
        replaced=batch.where[:, :-1].cpu().numpy().ravel(),
        ce_original=before.numpy().ravel(),
        ce_spliced=after.numpy().ravel(),
        kl=divergences.numpy().ravel(),
    )


class _SitePattern(NamedTuple):
    """The attention pattern that a site's queries or keys decide."""

    hook: str
    """Its hook, (contexts, heads, destinations, sources)."""
    point: str
    """The site's own hook point, (contexts, positions, heads, d_head)."""
    head: int | None

    @property
    def hooks(self) -> tuple[str, str]:
        """The hooks to observe in a run."""
        return self.hook, self.point

    def divergences(self, original: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Tensor:
        """Return KL(original ‖ changed), float64 (contexts, heads, destinations), of the heads that the site serves.

        Both hold the values at ``hooks``. A site serves its own head, the group that shares its keys, or all heads.
        """
        before, after = original[self.hook], changed[self.hook]
        if self.head is not None:
            # Keys of grouped attention have fewer heads than patterns: each serves as many, side by side.
            served = before.shape[1] // original[self.point].shape[2]
            heads = slice(self.head * served, (self.head + 1) * served)
            before, after = before[:, heads], after[:, heads]
        return pattern_divergences(before, after)


def _pattern_of(site: Site, points: Mapping[str, Any]) -> _SitePattern | None:
    """Return the pattern that ``site`` changes; None unless its output hook holds queries or keys."""
    hook = HookName.parse(site.hook_out)
    match = _QUERIES_OR_KEYS.fullmatch(hook.point)
    if match is None or f"{match[1]}.hook_pattern" not in points:
        return None
    return _SitePattern(f"{match[1]}.hook_pattern", hook.point, hook.head)


def token_rows(deltas: TokenDeltas) -> pa.RecordBatch:
    """Return the rows of a batch, context by context and position by position."""
    columns = {**deltas._asdict(), "delta": deltas.ce_spliced - deltas.ce_original}
    columns["sites"] = np.full(len(deltas.context), deltas.sites)
    return record_batch(TOKEN_SCHEMA, columns)
