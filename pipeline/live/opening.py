"""What live mode decides or measures once, at the start of the text, and keeps for the whole run.

Storage dtypes come from a look at the first batches, as for a cache; statistics are of the first block of training
rows. Both are functions of the settings and may be computed again; a run that is continued passes them on to save that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from tailrace.pipeline.cache.plan import PROBE_BATCHES, Probe, choose_dtypes, fixed_dtype
from tailrace.pipeline.cache.rows import RowMask
from tailrace.pipeline.cache.stage import check_pairing
from tailrace.pipeline.live.contexts import ContextBatches
from tailrace.pipeline.live.rows import RowMaker
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.cache_format import Site
from tailrace.storage.differences import list_differences
from tailrace.storage.encodings import Side
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.statistics import SiteStatistics


@dataclass(frozen=True)
class Opening:
    """Storage dtype of every site, and statistics of every side over the first block of training rows."""

    made_from: dict[str, Any]
    """What they belong to; see ``LiveBatches.made_from``."""
    dtypes: dict[str, str]
    statistics: dict[str, dict[Side, SiteStatistics]]

    def as_json(self) -> dict[str, Any]:
        """Return the opening as JSON; about 22 characters for every dimension of every side."""
        statistics = {
            site: {side: sums.as_json() for side, sums in sides.items()} for site, sides in self.statistics.items()
        }
        return {"made_from": self.made_from, "dtypes": self.dtypes, "statistics": statistics}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the opening written by ``as_json``."""
        statistics = {
            site: {side: SiteStatistics.from_json(sums) for side, sums in sides.items()}
            for site, sides in value["statistics"].items()
        }
        return cls(value["made_from"], value["dtypes"], statistics)


def choose_sites(
    settings: LiveSettings,
    model: LanguageModel,
    hooks: Sequence[SiteHooks],
    row_mask: RowMask,
    batches: ContextBatches,
    dtypes: Mapping[str, str] | None,
) -> tuple[Site, ...]:
    """Return the sites with their storage dtypes: those of an earlier opening, or else decided as for a cache.

    Raises ModelError if a layer's captured output is not its MLP of the captured input, NonFiniteActivation if the
    first batches hold NaN or infinity.
    """
    widths = model.widths(hooks)
    wide = [Site(hook.name, hook.hook_in, hook.hook_out, *widths[hook.name], "float32") for hook in hooks]
    first = next(batches)
    check_pairing(model, hooks, first.tokens, settings.model)
    if dtypes is None or dtypes.keys() != widths.keys():
        fixed = fixed_dtype(settings.storage_dtype, model.dtype)
        seen = None
        if fixed is None:
            maker = RowMaker(model, wide, row_mask, settings.contexts_per_batch)
            seen = Probe({}, {})
            for batch in (first, *islice(batches, PROBE_BATCHES - 1)):
                for key, rows in maker.rows(batch.tokens, batch.documents, batch.position.context).items():
                    hook = _hook_of(wide, key)
                    largest = float(rows.abs().max()) if len(rows) else 0.0
                    seen.largest[hook] = max(seen.largest.get(hook, 0.0), largest)
        dtypes = choose_dtypes(hooks, fixed, seen)
    return tuple(
        Site(site.name, site.hook_in, site.hook_out, site.d_in, site.d_out, dtypes[site.name]) for site in wide
    )


def _hook_of(sites: Sequence[Site], key: str) -> str:
    name, _, side = key.rpartition("/")
    site = next(site for site in sites if site.name == name)
    return site.hook_in if side == "in" else site.hook_out


def refuse_other_origin(what: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch where something was made from other settings, text or model than this run's."""
    if differences := list_differences(dict(recorded), dict(found)):
        raise ArtifactMismatch(
            f"{what} belongs to another live run; use the settings it was made with, or start anew:\n"
            + "\n".join(f"  {line}" for line in differences)
        )
