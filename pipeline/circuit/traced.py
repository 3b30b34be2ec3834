"""What circuits are traced through: a transcoder for each of some layers, or one over all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tailrace.analysis.circuits.record import mlp_layer
from tailrace.pipeline.circuit.question import Question, transcoder_sites
from tailrace.pipeline.train.layer_set_scores import LAYERS, LayerOutcome, read_layers
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.storage.tables import read_schema
from tailrace.training.architectures.transcoder import Transcoder, load_transcoder, read_transcoder_manifest
from tailrace.training.cross_layer.artifact import is_cross_layer, read_cross_layer_manifest, sites_of
from tailrace.training.cross_layer.layers import load_layers

_POOR_FVU = 0.9
"""Above this share of variance left unexplained, a transcoder is told of; 1 is as good as always the mean."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TracedLayers:
    """Layers that something stands in for, by number; everything is known from manifests alone."""

    sites: Mapping[int, Site]
    paths: Mapping[int, Path]
    """Where its transcoder lies; the same for all layers of a cross-layer transcoder."""
    digests: Mapping[int, str]
    """The transcoder's."""
    d_sae: Mapping[int, int]
    """Features that read the layer."""
    scores: Mapping[int, Mapping[str, Any]]
    """What manifests say of held-out rows, for layers that were scored: ``fvu``, and ``fvu_ordinary`` where taken."""
    n_layers: int
    """Of the language model."""
    is_cross_layer: bool = False

    @property
    def identities(self) -> dict[int, tuple[str, str]]:
        """Digest and site's name by layer, which tell the tables of each from all others."""
        return {layer: (self.digests[layer], site.name) for layer, site in self.sites.items()}

    def load(self) -> dict[Site, Transcoder]:
        """Return a transcoder for each site; of a cross-layer one, its layers."""
        if not self.is_cross_layer:
            return {site: load_transcoder(self.paths[layer]) for layer, site in self.sites.items()}
        (path,) = set(self.paths.values())
        return dict(zip(self.sites.values(), load_layers(path, list(self.sites)), strict=True))


def traced_layers(transcoders: Sequence[Path]) -> TracedLayers:
    """Return what the manifests of ``transcoders`` say.

    Raises SettingsError, with every problem, for sites that are no MLP's, two transcoders of one layer, and a
    cross-layer transcoder beside others.
    """
    across = [path for path in transcoders if is_cross_layer(path)]
    if across and len(transcoders) > 1:
        raise SettingsError(
            f"{across[0]}: is a cross-layer transcoder, which stands in for all its layers' MLPs; give it alone"
        )
    if across:
        return _cross_layer(across[0])
    found = transcoder_sites(transcoders)
    manifests = {layer: read_transcoder_manifest(path) for layer, (path, _) in found.items()}
    return TracedLayers(
        sites={layer: site for layer, (_, site) in found.items()},
        paths={layer: path for layer, (path, _) in found.items()},
        digests={layer: str(one["digest"]) for layer, one in manifests.items()},
        d_sae={layer: int(one["d_sae"]) for layer, one in manifests.items()},
        scores={layer: found for layer, one in manifests.items() if (found := one["metrics"].get("heldout"))},
        n_layers=max((int(one["model"]["n_layers"]) for one in manifests.values()), default=0),
    )


def _cross_layer(path: Path) -> TracedLayers:
    manifest = read_cross_layer_manifest(path)
    sites = {mlp_layer(site): site for site in sites_of(manifest)}
    by_layer = {layer: site for layer, site in sites.items() if layer is not None}
    if len(by_layer) < len(manifest["sites"]):
        raise SettingsError(
            f"{path}: circuits need a cross-layer transcoder of whole MLPs, blocks.L.mlp.hook_in to "
            f"blocks.L.mlp.hook_out; this one is of {', '.join(site['hook_out'] for site in manifest['sites'])}"
        )
    scores = {one["site"]: one for one in manifest["layers"]}
    return TracedLayers(
        sites=by_layer,
        paths=dict.fromkeys(by_layer, path),
        digests=dict.fromkeys(by_layer, str(manifest["digest"])),
        d_sae=dict.fromkeys(by_layer, int(manifest["d_sae"])),
        scores={layer: scores[site.name] for layer, site in by_layer.items() if site.name in scores},
        n_layers=int(manifest["model"]["n_layers"]),
        is_cross_layer=True,
    )


def warn_of_poor_layers(
    question: Question, transcoders: Mapping[int, Path], scores: Mapping[int, Mapping[str, Any]]
) -> None:
    """Log one warning that names every layer the answer goes through whose transcoder has an FVU above ``_POOR_FVU``.

    ``transcoders`` are by layer, ``scores`` what their manifests say of held-out rows. FVU is over ordinary rows where
    it was taken, else over all: from the ``layers.parquet`` that ``pipeline circuits-model`` writes beside its
    transcoders, or from the manifest. What was never scored is taken as it is.
    """
    poor = []
    for layer, path in sorted(transcoders.items()):
        if not _goes_through(question, layer):
            continue
        outcome = _score(path)
        known = scores.get(layer, {}) if outcome is None else asdict(outcome)
        is_ordinary = known.get("fvu_ordinary") is not None
        fvu = known.get("fvu_ordinary" if is_ordinary else "fvu")
        if fvu is not None and fvu > _POOR_FVU:
            poor.append(f"layer {layer} ({fvu:.3g} on {'ordinary' if is_ordinary else 'all'} rows)")
    if poor:
        logger.warning(
            "transcoders with an FVU above %g: %s; what goes through such a layer lies in its error node, not in "
            "features",
            _POOR_FVU,
            ", ".join(poor),
        )


def _goes_through(question: Question, layer: int) -> bool:
    """Return whether the MLP of a layer can be part of the answer: what a feature reads comes from those below it."""
    if question.feature is None:
        return True
    return layer < question.feature[0] + (question.direction == "decoder")


def _score(transcoder: Path) -> LayerOutcome | None:
    """Return a transcoder's scores; None if it was not made with others, whose table would lie beside it."""
    table = transcoder.resolve().parent / LAYERS
    # Tables of features have a table of this name as well.
    if not table.is_file() or set(read_schema(table).names) != {field.name for field in fields(LayerOutcome)}:
        return None
    return next((one for one in read_layers(table) if one.path == transcoder.resolve().name), None)
