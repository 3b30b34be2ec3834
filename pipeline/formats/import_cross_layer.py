"""The stage ``pipeline import`` for a folder of circuit-tracer's that holds a cross-layer transcoder.

As for one layer, a cache of the language model says what the files do not: which model, and which of its sites the
layers are. FVU and L0 of every layer, on the cache's rows, are part of the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailrace.analysis.circuits.record import mlp_layer
from tailrace.pipeline.formats.cross_layer import ForeignLayers, inspect_folder
from tailrace.pipeline.formats.import_transcoder import POOR_FVU, note_other_name, sites_of
from tailrace.pipeline.formats.settings import ImportSettings
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import checksum_file
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.training.architectures.transcoder import WEIGHTS, describe_versions, save_weights
from tailrace.training.cross_layer.artifact import FORMAT_VERSION, KIND, read_cross_layer_manifest
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.loop.evaluate import score_layers
from tailrace.training.rows.batches import iter_sites_once

ORIGIN = "circuit-tracer"
"""The format such folders are in."""
_BATCH_ROWS = 1024
_NAMED = 4
"""Sites that a message names where many are missing."""


@dataclass(frozen=True)
class CrossLayerImport:
    """A cross-layer transcoder that was imported."""

    path: Path
    sites: list[str]
    """Lowest layer first."""
    d_sae: int
    """Features that read one layer."""
    fvu: list[float | None]
    """Of each layer's output, on rows of the cache; None if the outputs do not vary."""
    l0: list[float]
    """Of the features that read each layer."""
    notes: list[str]
    """Sentences a user should read."""


def run(settings: ImportSettings, *, source: Path, cache: Path, output: Path, device: str = "cpu") -> CrossLayerImport:
    """Publish the cross-layer transcoder in the folder ``source`` at ``output``; return at once if it is there already.

    ``cache`` is of the language model it was trained on, and holds the site of every layer; ``settings.site`` names
    them, lowest first and with commas between, where the files do not. Raises the errors of reading the files,
    ArtifactMismatch if the cache lacks sites or has them of other widths, SettingsError if the sites are not told.
    """
    opened = open_cache(cache)
    foreign = inspect_folder(source)
    sites = _choose_sites(settings.site, foreign, opened)
    checksums = {path.name: checksum_file(path) for path in foreign.files}
    request = {
        "imported": {"origin": ORIGIN, "files": checksums},
        "settings": settings.model_dump(mode="json"),
        "cache": opened.reference,
    }
    with Draft(output, KIND, request) as draft:
        if not draft.published:
            transcoder = foreign.load()
            save_weights(output / WEIGHTS, transcoder)
            measured = _measure(transcoder.to(torch.device(device)), opened, sites, settings.rows)
            draft.publish(
                {
                    "format": FORMAT_VERSION,
                    "inputs": {"cache": opened.reference, "imported": checksums},
                    "origin": {"format": ORIGIN, "model_name": foreign.model_name, "facts": foreign.facts},
                    "model": opened.manifest.model,
                    "sites": [asdict(site) for site in sites],
                    "d_sae": foreign.d_sae,
                    "architecture": foreign.architecture.model_dump(mode="json"),
                    "normalisation": {"kind": "none", "scale_in": [1.0] * len(sites), "scale_out": [1.0] * len(sites)},
                    "learnt_from": None,
                    "precision": "float32",
                    # No step was taken here, and how many were elsewhere the files do not say.
                    "metrics": {"steps": 0, "rows": 0},
                    "layers": measured["layers"] if measured["split"] == "heldout" else [],
                    "measured": measured,
                    "notes": [*note_other_name(foreign.model_name, opened), *_note_poor(measured["layers"])],
                    "versions": describe_versions(),
                },
                [WEIGHTS],
            )
    return read_result(output)


def read_result(path: Path) -> CrossLayerImport:
    """Return what an imported cross-layer transcoder says; the errors are those of ``read_cross_layer_manifest``."""
    manifest = read_cross_layer_manifest(path)
    layers = manifest["measured"]["layers"]
    return CrossLayerImport(
        path=path,
        sites=[site["name"] for site in manifest["sites"]],
        d_sae=manifest["d_sae"],
        fvu=[layer["fvu"] for layer in layers],
        l0=[layer["l0"] for layer in layers],
        notes=list(manifest["notes"]),
    )


def _choose_sites(named: str | None, foreign: ForeignLayers, cache: ActivationCache) -> list[Site]:
    """Return a site of the cache for each layer."""
    there = "\n".join(f"  {site.name}: {site.hook_in} to {site.hook_out}" for site in cache.sites.values())
    if named is not None:
        sites = _named_sites([one.strip() for one in named.split(",")], foreign, cache, there)
    elif foreign.hooks is None:
        raise SettingsError(
            f"{foreign.folder}: does not say which hooks it belongs to; name {foreign.n_layers} sites of {cache.path}, "
            f"lowest layer first, with --site A,B,…:\n{there}"
        )
    else:
        sites = _hooked_sites(foreign.hooks, foreign, cache, there)
    widths = [
        f"{site.name} holds {site.d_in} and {site.d_out}"
        for site in sites
        if (site.d_in, site.d_out) != (foreign.d_model, foreign.d_model)
    ]
    if widths:
        raise ArtifactMismatch(
            f"{foreign.folder}: maps width {foreign.d_model} to {foreign.d_model}, but of {cache.path} "
            f"{'; '.join(widths)}; give a cache of the model it was trained on"
        )
    return sites


def _named_sites(names: Sequence[str], foreign: ForeignLayers, cache: ActivationCache, there: str) -> list[Site]:
    problems = [f"there is no {name!r}" for name in names if name not in cache.sites]
    if len(names) != foreign.n_layers:
        problems.append(f"{len(names)} sites are named, the files are of {foreign.n_layers} layers")
    layers = [mlp_layer(cache.sites[name]) for name in names if name in cache.sites]
    known = [layer for layer in layers if layer is not None]
    if known != sorted(set(known)):
        problems.append(f"they are of layers {', '.join(map(str, known))}; each is wanted once, lowest first")
    if problems:
        raise SettingsError(f"--site {','.join(names)}: {'; '.join(problems)}; {cache.path} has:\n{there}")
    return [cache.sites[name] for name in names]


def _hooked_sites(hooks: tuple[str, str], foreign: ForeignLayers, cache: ActivationCache, there: str) -> list[Site]:
    pairs = [(f"blocks.{layer}.{hooks[0]}", f"blocks.{layer}.{hooks[1]}") for layer in range(foreign.n_layers)]
    fitting = {pair: sites_of(pair, cache) for pair in pairs}
    if missing := [pair for pair in pairs if not fitting[pair]]:
        listed = ", ".join(f"{read} to {written}" for read, written in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ArtifactMismatch(
            f"{cache.path}: has no site from {listed}{more}, where {foreign.folder} belongs; cache them with --hooks "
            f"{missing[0][0]}:{missing[0][1]} and so on, or, if others are the same under other names, give these with "
            f"--site, lowest layer first:\n{there}"
        )
    return [fitting[pair][0] for pair in pairs]


def _measure(
    transcoder: CrossLayerTranscoder, cache: ActivationCache, sites: Sequence[Site], n_rows: int
) -> dict[str, Any]:
    """Return the score of each layer's output on held-out rows if there are any, else on training rows."""
    split = "heldout" if "heldout" in cache.manifest.splits else "train"
    batches = iter_sites_once(
        cache.split(split),
        sites,
        batch_rows=_BATCH_ROWS,
        device=transcoder.W_enc.device,
        max_rows=n_rows,
    )
    scores = score_layers(transcoder, [site.name for site in sites], batches)
    return {"split": split, "layers": [{"site": name, **score.record()} for name, score in scores.items()]}


def _note_poor(layers: Sequence[dict[str, Any]]) -> list[str]:
    poor = [f"{one['site']} {one['fvu']:.3f}" for one in layers if one["fvu"] is not None and one["fvu"] > POOR_FVU]
    if not poor:
        return []
    return [
        f"FVU on the cache's rows is no better than a constant's in {len(poor)} of {len(layers)} layers "
        f"({', '.join(poor[:_NAMED])}{', …' if len(poor) > _NAMED else ''}): if that is in all, this is not the model, "
        "the sites or the processing it was trained on"
    ]
