"""Scores of an evaluation with transcoders in place: cross entropies, shares recovered, divergences, FVU and L0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tailrace.analysis.evaluate.recovered import recovered
from tailrace.analysis.splice.in_place import InPlaceScore


@dataclass(frozen=True)
class Outcome:
    """The model after one kind of replacement, beside the original; means over predictions, in nats."""

    ce: float
    kl: float
    """KL(original ‖ replaced) of the next-token distributions."""
    pattern_kl: dict[str, float]
    """By site, for sites at the queries or keys of attention: KL(original ‖ replaced) of the patterns of the site's
    head (of all heads if it has none), mean over contexts, heads and destinations."""


@dataclass(frozen=True)
class SpliceScore:
    """The scores of one set of sites, replaced together."""

    sites: tuple[str, ...]
    n_contexts: int
    n_predictions: int
    ce_original: float
    spliced: Outcome
    zero: Outcome
    mean: Outcome
    ce_increase_error: float | None
    """Standard error of spliced minus original: the spread of contexts, whose tokens are not independent; None for
    one context."""
    in_place: dict[str, InPlaceScore]
    """By site."""

    @property
    def ce_recovered(self) -> float | None:
        """(zero − spliced) / (zero − original): 1 is as good as the MLPs; None where zero ablation costs nothing."""
        return recovered(self.zero.ce, self.spliced.ce, self.ce_original)

    @property
    def ce_recovered_from_mean(self) -> float | None:
        """The same for mean ablation, which is harder to beat."""
        return recovered(self.mean.ce, self.spliced.ce, self.ce_original)

    def record(self) -> dict[str, Any]:
        """Return the fields and both shares as JSON."""
        shares = {"ce_recovered": self.ce_recovered, "ce_recovered_from_mean": self.ce_recovered_from_mean}
        return {**asdict(self), "sites": list(self.sites), **shares}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SpliceScore:
        """Return the score of which ``record`` is the JSON."""
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        outcomes = {name: Outcome(**record[name]) for name in ("spliced", "zero", "mean")}
        in_place = {name: InPlaceScore(**score) for name, score in record["in_place"].items()}
        return cls(**{**fields, **outcomes, "sites": tuple(record["sites"]), "in_place": in_place})
