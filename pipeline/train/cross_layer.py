"""The stage ``pipeline train --cross-layer``: one transcoder over several layers of a published cache.

The loop, its checkpoints and logs are those of every transcoder (``tailrace.training.loop.session``); only the rows are
joined.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tailrace.analysis.circuits.record import mlp_layer
from tailrace.pipeline.shared.device import limited_threads, open_device
from tailrace.pipeline.train.sources import CachedRows, CacheSource, unknown_site
from tailrace.pipeline.train.stage import TrainResult, discard_draft, nothing_left_if_refused
from tailrace.storage.activation_cache import ActivationCache, CacheSplit
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.transcoder import CHECKPOINTS, describe_versions
from tailrace.training.cross_layer.artifact import (
    FORMAT_VERSION,
    KIND,
    read_cross_layer_manifest,
    rows_at_once,
    score_layers,
)
from tailrace.training.cross_layer.run import CrossLayerBuild, build_cross_layer, cross_layer_problems
from tailrace.training.cross_layer.units import JoinedBatches, JoinedRows
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.loggers import Logger
from tailrace.training.loop.session import HeldoutBatches, Session
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.sweep import Member, train_together
from tailrace.training.rows.batches import Batch, SiteBatches, iter_sites_once
from tailrace.training.rows.ordinary_rows import massive_warning

logger = logging.getLogger(__name__)


def run(
    settings: TrainSettings,
    *,
    output: Path,
    cache: Path,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    fresh: bool = False,
    checkpoint_steps: int = 1000,
    loggers: Callable[[], list[Logger]] = list,
) -> TrainResult:
    """Train on the cache at ``cache`` and publish the cross-layer transcoder at ``output``.

    An unfinished run there with the same settings is continued, a finished one returned as it is; ``fresh`` throws an
    unfinished one away first. Raises SettingsError with every problem of settings and cache, and the errors of
    ``tailrace.storage.artifact.Draft`` and of opening the cache.
    """
    on = open_device(device)
    if fresh:
        discard_draft(output)
    source = CacheSource(cache, batch_rows=settings.batch_rows, order_seed=settings.order_seed, device=on)
    sites = choose_sites(settings, source.cache)
    precision = resolve_precision(settings.precision, on)
    decided = settings.model_copy(update={"precision": precision, "site": ",".join(site.name for site in sites)})
    request = {"settings": decided.model_dump(mode="json"), **source.request}
    with ExitStack() as stack:
        stack.enter_context(limited_threads(threads))
        stack.enter_context(nothing_left_if_refused(output))
        draft = stack.enter_context(Draft(output, KIND, request, discard_with="--fresh"))
        if not draft.published:
            rows = stack.enter_context(source.open(sites, output))
            training = _Training(decided, source, rows, sites, draft, on)
            training.run(stack, checkpoint_steps, quiet=quiet, loggers=loggers())
        Checkpoints(output / CHECKPOINTS).clear()
    return TrainResult(output, read_cross_layer_manifest(output)["metrics"])


def choose_sites(settings: TrainSettings, cache: ActivationCache) -> list[Site]:
    """Return the sites to train on, lowest layer first.

    Raises SettingsError listing every setting and site of which no cross-layer transcoder can be made.
    """
    names = list(cache.sites) if settings.site is None else _names(settings.site, cache)
    problems = []
    for name in names:
        problems += unknown_site(name, list(cache.sites))
    sites = [cache.sites[name] for name in dict.fromkeys(names) if name in cache.sites]
    layers = {site.name: mlp_layer(site) for site in sites}
    problems += [
        f"site {name}: its hooks name no layer, or two ({cache.sites[name].hook_out})"
        for name, layer in layers.items()
        if layer is None
    ]
    by_layer: dict[int, list[str]] = {}
    for name, number in layers.items():
        if number is not None:
            by_layer.setdefault(number, []).append(name)
    problems += [
        f"site: {' and '.join(own)} are of one layer; name one of them with --site"
        for own in by_layer.values()
        if len(own) > 1
    ]
    problems += cross_layer_problems(settings, sites)
    if problems:
        raise SettingsError(
            f"{cache.path}: no cross-layer transcoder can be made of this:\n" + "\n".join(f"  {p}" for p in problems)
        )
    return sorted(sites, key=lambda site: layers[site.name] or 0)


def _names(text: str, cache: ActivationCache) -> list[str]:
    """Return the sites that ``text`` names, separated by commas; layer3-5 is a range, for numbers at the end."""
    names = []
    for part in (one.strip() for one in text.split(",")):
        ends = re.fullmatch(r"(.*?)(\d+)-(.*?)(\d+)", part)
        if part in cache.sites or ends is None or ends[3] not in ("", ends[1]):
            names.append(part)
        else:
            names += [f"{ends[1]}{number}" for number in range(int(ends[2]), int(ends[4]) + 1)]
    return names


class _Training:
    """One run from its draft to its manifest."""

    def __init__(
        self,
        settings: TrainSettings,
        source: CacheSource,
        rows: CachedRows,
        sites: Sequence[Site],
        draft: Draft,
        device: torch.device,
    ) -> None:
        self._settings, self._source, self._rows = settings, source, rows
        self._sites, self._draft, self._device = sites, draft, device

    def run(self, stack: ExitStack, checkpoint_steps: int, *, quiet: bool, loggers: list[Logger]) -> None:
        """Train from where it was left, and publish."""
        settings = self._settings
        n_steps = self._rows.n_steps(settings)
        for sentence in [*settings.without_effect(n_steps), *self._massive()]:
            logger.warning("%s: %s", self._draft.path, sentence)
        built = self._build(n_steps)
        session = Session(
            self._draft.path,
            built.run,
            settings,
            n_steps=n_steps,
            heldout=self._heldout(built.rows),
            checkpoint_steps=checkpoint_steps,
            loggers=loggers,
            quiet=quiet,
        )
        member = Member(
            built.run,
            stack.enter_context(session),
            Checkpoints(self._draft.path / CHECKPOINTS),
            [settings.evaluate_every],
            finish=lambda: self._publish(built, session),
        )
        train_together(JoinedBatches(self._rows.stream, built.rows), [member], checkpoint_steps=checkpoint_steps)

    def _massive(self) -> Iterator[str]:
        for site in self._sites:
            statistics = self._rows.statistics(site)["out"]
            if (sentence := massive_warning(site.name, statistics, self._settings.max_norm_multiple)) is not None:
                yield sentence

    def _build(self, n_steps: int) -> CrossLayerBuild:
        settings = self._settings
        assert settings.precision != "auto", "it was decided for the request"
        return build_cross_layer(
            settings,
            self._sites,
            {site.name: self._rows.statistics(site) for site in self._sites},
            {site.name: self._rows.fresh_rows(site, settings.seed) for site in self._sites},
            n_steps=n_steps,
            device=self._device,
            precision=settings.precision,
            name=self._draft.path.name,
        )

    def _heldout(self, joined: JoinedRows) -> HeldoutBatches | None:
        """Return joined held-out rows in the units they are learnt in, so that every layer counts alike."""
        split = self._rows.heldout_split()
        if split is None:
            return None

        def batches(max_rows: int | None) -> Iterator[Batch]:
            for one in self._in_order(split, max_rows):
                batch = joined(one)
                if len(batch.inputs):
                    yield batch

        return batches

    def _publish(self, built: CrossLayerBuild, session: Session) -> None:
        files = session.export()
        settings, units = self._settings, built.units
        self._draft.publish(
            {
                "format": FORMAT_VERSION,
                **self._source.description(),
                "sites": [asdict(site) for site in self._sites],
                "d_sae": settings.n_features(self._sites[0].d_in),
                "architecture": settings.architecture.model_dump(mode="json"),
                "normalisation": {
                    "kind": settings.normalisation,
                    "scale_in": units.scales_in,
                    "scale_out": units.scales_out,
                },
                "learnt_from": {name: asdict(limits) for name, limits in built.ordinary.items()} or None,
                "precision": settings.precision,
                "metrics": session.summary(),
                "layers": self._layers(built),
                "versions": describe_versions(),
            },
            files,
        )
        logger.info("%s: published after %d steps", self._draft.path, built.run.n_steps_done)

    def _layers(self, built: CrossLayerBuild) -> list[Mapping[str, Any]]:
        """Return the score of each layer's output over all held-out rows."""
        split = self._rows.heldout_split()
        if split is None:
            return []
        transcoder = built.run.folded().to(self._device)
        scores = score_layers(transcoder, self._sites, self._in_order(split), built.rows)
        return [{"site": site.name, **score.record()} for site, score in zip(self._sites, scores, strict=True)]

    def _in_order(self, split: CacheSplit, max_rows: int | None = None) -> Iterator[SiteBatches]:
        """Yield rows to score, no more at a time than their activations at all layers allow."""
        d_sae = len(self._sites) * self._settings.n_features(self._sites[0].d_in)
        rows = rows_at_once(d_sae, self._settings.batch_rows)
        return iter_sites_once(split, self._sites, batch_rows=rows, device=self._device, max_rows=max_rows)
