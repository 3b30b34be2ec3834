"""Where training rows come from, seen alike by every run: the batches of a cache, or of a language model as it runs.

A source is cheap to make, opened once for all runs that share it, and says what an artifact must record of it.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from tailrace.analysis.circuits.record import mlp_layer
from tailrace.storage.activation_cache import ActivationCache, CacheSplit
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.names import by_number
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.loop.build import cross_layer_problems
from tailrace.training.loop.session import HeldoutBatches
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import BatchStream, CacheBatches, iter_sites_once
from tailrace.training.rows.row_source import CacheRows, RowSource

logger = logging.getLogger(__name__)


class TrainingRows(Protocol):
    """Rows that are being read. Everything a run needs besides its settings."""

    @property
    def stream(self) -> BatchStream:
        """Batches of every site opened."""
        ...

    def statistics(self, site: Site) -> Mapping[Side, SiteStatistics]:
        """Return what normalisation and initial weights are made from."""
        ...

    def heldout(self, sites: Sequence[Site]) -> HeldoutBatches | None:
        """Return a source of held-out batches of ``sites``, or None without held-out rows."""
        ...

    def n_steps(self, settings: TrainSettings) -> int:
        """Return the number of optimiser steps that the settings ask for."""
        ...

    def fresh_rows(self, site: Site, seed: int) -> RowSource | None:
        """Return what gives further training rows on demand, or None where rows come in one order only."""
        ...

    def confirm(self) -> None:
        """Raise ArtifactCorrupt if rows that were served may be damaged, before what was learnt from them counts."""
        ...


class TrainingSource(Protocol):
    """Training rows that can be opened."""

    @property
    def where(self) -> str:
        """How messages call it."""
        ...

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites there are, by name; of live rows, loads the language model."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether a look at ``sites`` costs nothing."""
        ...

    @property
    def site_names(self) -> Sequence[str] | None:
        """The names of ``sites`` at no cost, or None where only the language model can tell."""
        ...

    def decided(self, settings: TrainSettings) -> TrainSettings:
        """Return settings with the choices made that depend on the source and can be known before it is opened."""
        ...

    def problems(self, settings: TrainSettings) -> list[str]:
        """Return a sentence for each setting that this source cannot honour, as far as that is known at no cost."""
        ...

    @property
    def request(self) -> dict[str, Any]:
        """What decides the rows, for a request."""
        ...

    def description(self) -> dict[str, Any]:
        """Return what a manifest says of the rows; it has the keys ``inputs`` and ``model``."""
        ...

    def open(self, sites: Sequence[Site], draft: Path) -> Any:
        """Return a context manager of ``TrainingRows``; ``draft`` is where the source may keep what a rerun can use."""
        ...


class CacheSource:
    """The rows of a published cache."""

    def __init__(self, cache: ActivationCache, *, batch_rows: int, order_seed: int, device: torch.device) -> None:
        self.cache = cache
        self._batch_rows, self._order_seed, self._device = batch_rows, order_seed, device

    @property
    def where(self) -> str:
        """The cache's path."""
        return str(self.cache.path)

    @property
    def sites(self) -> Mapping[str, Site]:
        """The cached sites by name."""
        return self.cache.sites

    @property
    def is_loaded(self) -> bool:
        """True: the manifest says what the sites are."""
        return True

    @property
    def site_names(self) -> Sequence[str]:
        """The names of the cached sites."""
        return list(self.cache.sites)

    def decided(self, settings: TrainSettings) -> TrainSettings:
        """Return settings that name their sites; they are those of ``choose_sites``."""
        return settings.model_copy(update={"site": ",".join(site.name for site in choose_sites(settings, self))})

    def problems(self, settings: TrainSettings) -> list[str]:  # noqa: ARG002
        """Return no problem: a cache honours every setting."""
        return []

    @property
    def request(self) -> dict[str, Any]:
        """The cache's identity."""
        return {"cache": self.cache.reference}

    def description(self) -> dict[str, Any]:
        """Return the cache's identity, its model's, and how its contexts and rows were made."""
        packing = self.cache.manifest.packing
        described = {"inputs": {"cache": self.cache.reference}, "model": self.cache.manifest.model}
        return {**described, "packing": packing} if packing else described

    @contextmanager
    def open(self, sites: Sequence[Site], draft: Path) -> Iterator[CachedRows]:  # noqa: ARG002
        """Read ahead inside."""
        split = self.cache.split("train")
        with CacheBatches(
            split, sites, batch_rows=self._batch_rows, seed=self._order_seed, device=self._device
        ) as stream:
            yield CachedRows(self.cache, split, stream, self._batch_rows, self._device)


class CachedRows:
    """Rows of a cache that are being read."""

    def __init__(
        self,
        cache: ActivationCache,
        split: CacheSplit,
        stream: CacheBatches,
        batch_rows: int,
        device: torch.device,
    ) -> None:
        self.stream = stream
        self._cache, self._split, self._batch_rows, self._device = cache, split, batch_rows, device
        self._statistics: dict[str, dict[Side, SiteStatistics]] = {}
        self._has_warned = False

    def statistics(self, site: Site) -> Mapping[Side, SiteStatistics]:
        """Return those of the cache's training rows; read once, however many runs ask."""
        if site.name not in self._statistics:
            self._statistics[site.name] = {side: self._split.statistics(site.name, side) for side in site.sides}
        return self._statistics[site.name]

    def heldout(self, sites: Sequence[Site]) -> HeldoutBatches | None:
        """Return the held-out rows, the same for every run; warn, once, if there are none."""
        if "heldout" in self._cache.manifest.splits:
            split = self._cache.split("heldout")
            return lambda max_rows: iter_sites_once(
                split, sites, batch_rows=self._batch_rows, device=self._device, max_rows=max_rows
            )
        if not self._has_warned:
            logger.warning(
                "%s has no held-out rows: nothing will say how well the transcoder generalises", self._cache.path
            )
        self._has_warned = True
        return None

    def n_steps(self, settings: TrainSettings) -> int:
        """Return the number of steps; epochs are passes over the cache. The stream will serve as many."""
        n_steps = settings.n_steps(self._split.n_rows, self.stream.n_steps_per_epoch)
        self.stream.expect(n_steps)
        return n_steps

    def fresh_rows(self, site: Site, seed: int) -> RowSource:
        """Return samples of the cache's training rows."""
        return CacheRows(self._split, site, seed=seed, device=self._device)

    def confirm(self) -> None:
        """Wait for the shards that are compared in this epoch."""
        self.stream.confirm()


def choose_sites(settings: TrainSettings, source: TrainingSource) -> list[Site]:
    """Return the sites to train on, lowest layer first: one, or several of a cross-layer transcoder.

    Raises SettingsError listing every setting that does not fit the source. Where there are problems already, no
    language model is loaded to look for more.
    """
    problems = known_problems(settings, source)
    sites: list[Site] = []
    if source.is_loaded or not problems:
        if source.site_names is None:
            problems += _site_problems(settings, list(source.sites))
        names = _names(settings, list(source.sites))
        sites = [source.sites[name] for name in dict.fromkeys(names) if name in source.sites]
        if settings.cross_layer:
            problems += _layer_problems(sites) + cross_layer_problems(settings, sites)
        elif len(sites) == 1:
            problems += _one_site_problems(settings, sites[0])
    if problems:
        made = "no cross-layer transcoder can be made of this" if settings.cross_layer else "cannot train on this"
        raise SettingsError(f"{source.where}: {made}:\n" + "\n".join(f"  {line}" for line in problems))
    return sorted(sites, key=lambda site: mlp_layer(site) or 0) if settings.cross_layer else sites


def known_problems(settings: TrainSettings, source: TrainingSource) -> list[str]:
    """Return a sentence for each setting that does not fit the source, as far as that is known at no cost."""
    problems = source.problems(settings)
    if source.site_names is not None:
        problems += _site_problems(settings, source.site_names)
    if settings.d_sae is not None and not settings.cross_layer:
        problems += settings.architecture.problems(settings.d_sae)
    return problems


def _names(settings: TrainSettings, known: Sequence[str]) -> list[str]:
    """Return the sites that the settings name, separated by commas; layer3-5 is a range, for numbers at the end."""
    if settings.site is None or not settings.cross_layer:
        return list(known) if settings.site is None else [settings.site]
    names = []
    for part in (part.strip() for part in settings.site.split(",")):
        ends = re.fullmatch(r"(.*?)(\d{1,9})-(.*?)(\d{1,9})", part)
        if part in known or ends is None or ends[3] not in ("", ends[1]):
            names.append(part)
        else:
            names += [f"{ends[1]}{number}" for number in range(int(ends[2]), int(ends[4]) + 1)]
    return names


def _site_problems(settings: TrainSettings, known: Sequence[str]) -> list[str]:
    if settings.site is None:
        several = len(known) > 1 and not settings.cross_layer
        names = ",".join(sorted(known, key=by_number))
        advice = f"choose one with --site, all with --sweep site={names} or, as one transcoder, with --cross-layer"
        return [f"site: there are {len(known)}, {names.replace(',', ', ')}; {advice}"] if several else []
    return [problem for name in _names(settings, known) for problem in _unknown_site(name, known)]


def _unknown_site(chosen: str, names: Sequence[str]) -> list[str]:
    """Return a sentence with what may have been meant if ``chosen`` is none of ``names``."""
    if chosen in names:
        return []
    if "," in chosen:
        return [f"site: {chosen!r} names several, which only --cross-layer takes; give one of {', '.join(names)}"]
    near = difflib.get_close_matches(chosen, names)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return [f"site: there is no site {chosen!r}; {meant}there {_are(names)}"]


def _layer_problems(sites: Sequence[Site]) -> list[str]:
    """Return a sentence for each site whose layer is not known, or that is another's too."""
    by_layer: dict[int | None, list[Site]] = {}
    for site in sites:
        by_layer.setdefault(mlp_layer(site), []).append(site)
    unknown = by_layer.pop(None, [])
    return [
        *(f"site {site.name}: its hooks name no layer, or two ({site.hook_out})" for site in unknown),
        *(
            f"site: {' and '.join(site.name for site in own)} are of one layer; name one of them with --site"
            for own in by_layer.values()
            if len(own) > 1
        ),
    ]


def _one_site_problems(settings: TrainSettings, site: Site) -> list[str]:
    problems = []
    if settings.d_sae is None:
        problems += settings.architecture.problems(settings.n_features(site.d_in))
    if settings.architecture.skip and site.hook_in == site.hook_out:
        problems.append("architecture.skip: an autoencoder's outputs are its inputs, which a linear path would copy")
    if getattr(settings.architecture, "tied_bias", False) and site.hook_in != site.hook_out:
        problems.append(
            f"architecture.tied_bias: is for autoencoders, and site {site.name} has another input than output"
        )
    return problems


def _are(names: Sequence[str]) -> str:
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}"
