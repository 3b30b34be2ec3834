"""A cross-layer transcoder as something that stands in for several sites of a model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailrace.analysis.evaluate.evaluation import SplicedSite
from tailrace.analysis.splice.cross_layer import layers_in_place
from tailrace.pipeline.analyze.stage import check_same_site
from tailrace.pipeline.cache.recorded_model import RecordedModel
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.errors import ArtifactMismatch
from tailrace.training.cross_layer.artifact import load_cross_layer, read_cross_layer_manifest, sites_of


def check_cross_layer(cache: ActivationCache, path: Path) -> dict[str, Any]:
    """Return the manifest of a cross-layer transcoder; raise ArtifactMismatch unless the cache has all its sites."""
    made_of = read_cross_layer_manifest(path)
    problems = []
    for site in made_of["sites"]:
        try:
            check_same_site(cache, cache.path, {"site": site, "model": made_of["model"]}, path)
        except ArtifactMismatch as error:
            problems.append(str(error))
    if problems:
        raise ArtifactMismatch("\n".join(dict.fromkeys(problems)))
    return made_of


def open_spliced_layers(recorded: RecordedModel, path: Path) -> list[SplicedSite]:
    """Load a cross-layer transcoder beside the model, with each site's mean output for ablation."""
    transcoder = load_cross_layer(path).to(recorded.model.device)
    train = recorded.cache.split("train")
    sites = sites_of(read_cross_layer_manifest(path))
    return [
        SplicedSite(recorded.cache.sites[site.name], part, train.statistics(site.name, "out").mean)
        for site, part in zip(sites, layers_in_place(transcoder), strict=True)
    ]
