"""The stage ``pipeline train``: one transcoder from one site of a published cache. Loads no language model.

The precision that ``auto`` stands for is part of the request: a draft begun on a machine with bfloat16 instructions
must not be finished in float32 on another.
"""

from __future__ import annotations

import difflib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.device import limited_threads, open_device
from storage.activation_cache import ActivationCache, open_cache
from storage.artifact import LOCK, MANIFEST, REQUEST, Draft, Lock
from storage.cache_format import Site
from storage.encodings import Side
from storage.errors import ArtifactMismatch, SettingsError
from storage.statistics import SiteStatistics
from training.batches import CacheBatches, iter_once
from training.build import build_run
from training.checkpoint import Checkpoints
from training.kernels.adaptive import resolve_precision
from training.kernels.kernel import Precision
from training.run import TrainingRun
from training.session import HeldoutBatches, Session
from training.settings import TrainSettings
from training.trainer import PeriodicHook, train
from training.transcoder import CHECKPOINTS, FORMAT_VERSION, KIND, describe_versions, read_transcoder_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A published transcoder."""

    path: Path
    metrics: dict[str, Any]
    """``steps``, ``rows``, the last ``train`` losses and the ``heldout`` score over all held-out rows."""


def run(
    settings: TrainSettings,
    *,
    cache: Path,
    output: Path,
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
    fresh: bool = False,
    checkpoint_steps: int = 1000,
    hooks: Sequence[tuple[int, PeriodicHook]] = (),
) -> TrainResult:
    """Train on the cache at ``cache`` and publish the transcoder at ``output``.

    An unfinished run at ``output`` with the same settings is continued, a finished one returned as it is; ``fresh``
    throws an unfinished one away first. ``hooks`` are (every so many steps, hook). Raises SettingsError with every
    problem of the settings, and the errors of ``storage.artifact.Draft`` and ``storage.activation_cache.open_cache``.
    """
    opened = open_cache(cache)
    on = open_device(device)
    site = choose_site(settings, opened)
    precision = resolve_precision(settings.precision, on)
    if fresh:
        discard_draft(output)
    with limited_threads(threads), Draft(output, KIND, describe_request(settings, opened, site, precision)) as draft:
        if not draft.published:
            _train(settings, opened, site, draft, on, precision, checkpoint_steps, hooks, quiet)
        Checkpoints(output / CHECKPOINTS).clear()
    return TrainResult(output, read_transcoder_manifest(output)["metrics"])


def _train(
    settings: TrainSettings,
    cache: ActivationCache,
    site: Site,
    draft: Draft,
    device: torch.device,
    precision: Precision,
    checkpoint_steps: int,
    hooks: Sequence[tuple[int, PeriodicHook]],
    quiet: bool,
) -> None:
    split = cache.split("train")
    statistics: dict[Side, SiteStatistics] = {side: split.statistics(site.name, side) for side in site.sides}
    with CacheBatches(split, [site], batch_rows=settings.batch_rows, seed=settings.order_seed, device=device) as stream:
        n_steps = settings.n_steps(split.n_rows, stream.n_steps_per_epoch)
        training = build_run(settings, site, statistics, n_steps=n_steps, device=device, precision=precision)
        heldout = open_heldout(cache, site, settings.batch_rows, device)
        session = Session(
            draft.path,
            training,
            settings,
            n_steps=n_steps,
            heldout=heldout,
            checkpoint_steps=checkpoint_steps,
            hooks=hooks,
            quiet=quiet,
        )
        with session:
            steps = session.checkpoint_steps()
            if (state := session.resume(steps[-1] if steps else None)) is not None:
                stream.load_state_dict(state)
            train(stream, [training], session.duties(stream), n_steps=n_steps, first_step=training.n_steps_done)
            files = session.export()
        draft.publish(describe(settings, cache, site, training, precision, session.summary()), files)


def choose_site(settings: TrainSettings, cache: ActivationCache) -> Site:
    """Return the site to train on; raise SettingsError listing every setting that does not fit the cache."""
    problems = []
    site = None
    names = list(cache.sites)
    if settings.site is None:
        if len(names) > 1:
            problems.append(f"site: the cache has {len(names)}; choose one of {', '.join(names)}")
        else:
            site = cache.sites[names[0]]
    elif settings.site in cache.sites:
        site = cache.sites[settings.site]
    else:
        near = difflib.get_close_matches(settings.site, names)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        problems.append(f"site: the cache has no {settings.site!r}; {meant}it has {', '.join(names)}")
    if site is not None:
        problems += settings.architecture.problems(settings.n_features(site.d_in))
        if settings.architecture.skip and site.hook_in == site.hook_out:
            problems.append(
                "architecture.skip: an autoencoder's outputs are its inputs, which a linear path would copy"
            )
    elif settings.d_sae is not None:
        problems += settings.architecture.problems(settings.d_sae)
    if problems or site is None:
        raise SettingsError(
            f"{cache.path}: cannot train on this cache:\n" + "\n".join(f"  {line}" for line in problems)
        )
    return site


def open_heldout(cache: ActivationCache, site: Site, batch_rows: int, device: torch.device) -> HeldoutBatches | None:
    """Return a source of held-out batches, or None if the cache has no held-out rows."""
    if "heldout" not in cache.manifest["splits"]:
        logger.warning("%s has no held-out rows: nothing will say how well the transcoder generalises", cache.path)
        return None
    split = cache.split("heldout")
    return lambda max_rows: iter_once(split, site, batch_rows=batch_rows, device=device, max_rows=max_rows)


def describe_request(
    settings: TrainSettings, cache: ActivationCache, site: Site, precision: Precision
) -> dict[str, Any]:
    """Return what decides the transcoder: settings with their choices made, and the cache."""
    chosen = settings.model_copy(update={"site": site.name, "precision": precision})
    return {"settings": chosen.model_dump(mode="json"), "cache": cache.reference}


def describe(
    settings: TrainSettings,
    cache: ActivationCache,
    site: Site,
    training: TrainingRun,
    precision: Precision,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a trained transcoder."""
    return {
        "format": FORMAT_VERSION,
        "inputs": {"cache": cache.reference},
        "model": cache.manifest.get("model"),
        "site": asdict(site),
        "d_sae": training.transcoder.d_sae,
        "architecture": settings.architecture.model_dump(mode="json"),
        "normalisation": {
            "kind": settings.normalisation,
            "scale_in": training.normalisation.scale_in,
            "scale_out": training.normalisation.scale_out,
        },
        "precision": precision,
        "metrics": metrics,
        "versions": describe_versions(),
    }


def discard_draft(path: Path) -> None:
    """Delete an unfinished run, so that the next one starts from nothing.

    Raises ArtifactMismatch where something published lies: that is never deleted by a flag.
    """
    if not (path / REQUEST).exists():
        return
    if (path / MANIFEST).exists():
        raise ArtifactMismatch(f"{path}: is published; delete it yourself, or choose another path, to train anew")
    lock = Lock(path)
    try:
        # The request goes last: a deletion that is cut short is still recognised as a draft.
        leftovers = [entry for entry in path.iterdir() if entry.name not in (LOCK, REQUEST)]
        for entry in [*leftovers, path / REQUEST]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    finally:
        lock.release()
