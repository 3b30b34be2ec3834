"""What the sites of a live run will be called, before its language model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from tailrace.pipeline.cache.settings import CapturedSites
from tailrace.pipeline.model.sites import resolve_sites
from tailrace.storage.errors import ModelError

_MOST_LAYERS = 10_000


class _AnyName(Collection[str]):
    """Stands for the hooks of a model that is not there: it has every one that is asked for."""

    def __contains__(self, name: object) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[str]:
        return iter(())


def names_asked_for(settings: CapturedSites) -> list[str] | None:
    """Return the names of the sites asked for; None where the model must be asked, or will refuse them."""
    if settings.layers is not None and settings.layers.strip().lower() == "all":
        return None
    try:
        sites = resolve_sites(
            settings.layers, settings.hooks, n_layers=_MOST_LAYERS, hook_names=_AnyName(), count_heads=_no_heads
        )
    except ModelError:  # told when the model is loaded, together with what only it knows
        return None
    return [site.name for site in sites]


def _no_heads(hooks: Sequence[str]) -> Mapping[str, int]:  # noqa: ARG001
    """Return nothing: hooks that are left out are not judged."""
    return {}
