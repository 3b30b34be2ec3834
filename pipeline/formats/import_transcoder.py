"""The stage ``pipeline import``: another tool's transcoder as one of ours, ready to be analysed and evaluated.

Files of other tools say too little of the language model they belong to, so a cache of that model says it: the imported
transcoder gets the identity of its model and the hooks of a site for each of its layers. Whether it belongs there is
then a matter of numbers, and they are measured at once: FVU and L0 on the cache's rows are part of the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailrace.analysis.circuits.record import mlp_layer
from tailrace.pipeline.formats import (
    circuit_tracer,
    cross_layer,
    dictionary_learning,
    gemma_scope,
    reference,
    saelens,
    sparsify,
)
from tailrace.pipeline.formats.cross_layer import ForeignLayers
from tailrace.pipeline.formats.foreign import Foreign, ForeignRecord
from tailrace.pipeline.formats.hooks import hooked_transformer_name
from tailrace.pipeline.formats.settings import ORIGINS, ImportSettings, Origin
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, reopen_cache
from tailrace.storage.artifact import checksum_file
from tailrace.storage.cache_format import Site
from tailrace.storage.compared import refuse_changed
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS, CROSS_LAYER_KIND
from tailrace.storage.generations import CachePath
from tailrace.storage.names import by_number, matching
from tailrace.training.architectures.manifest import KIND, WEIGHTS, read_either_manifest
from tailrace.training.architectures.transcoder import Transcoder, describe_versions, save_weights
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.loop.evaluate import HeldoutScore, evaluate, predictor, score_layers
from tailrace.training.rows.batches import iter_sites_once

_READERS: dict[Origin, Callable[[Path], Foreign | ForeignLayers]] = {
    "saelens": saelens.read,
    "circuit-tracer": lambda path: cross_layer.read(path) if path.is_dir() else circuit_tracer.read(path),
    "gemma-scope": gemma_scope.read,
    "sparsify": sparsify.read,
    "dictionary-learning": dictionary_learning.read,
    "reference": reference.read,
}
_IN_FOLDERS: dict[Origin, tuple[str, ...]] = {
    "saelens": (saelens.CONFIG, saelens.WEIGHTS),
    "sparsify": (sparsify.CONFIG, sparsify.WEIGHTS),
    "dictionary-learning": (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
}
"""Files that are read, of formats that are folders."""
_BESIDE: dict[Origin, Callable[[Path], Path]] = {
    "saelens": lambda folder: folder / saelens.SPARSITY,
    "gemma-scope": lambda path: path.parent / gemma_scope.CONFIG,
    "reference": reference.sparsity_file,
}
"""A file that is read too if it is there."""
_BATCH_ROWS = 1024
_NAMED = 4
"""Layers that a message names where many are meant."""
SILENT = 1e-9
"""Rates up to this are of features that never fired: files have log10 of the rate plus 1e-10."""
POOR_FVU = 0.9
"""Above this, a transcoder is taken not to belong to the rows it was measured on."""


@dataclass(frozen=True)
class ImportResult:
    """A transcoder that was imported."""

    path: Path
    sites: list[str]
    """Of its layers, lowest first."""
    d_sae: int
    """Features that read one layer."""
    fvu: list[float | None]
    """Of each layer's output, on rows of the cache; None if the outputs do not vary."""
    l0: list[float]
    """Of the features that read each layer."""
    notes: list[str]
    """Sentences a user should read."""


def run(
    settings: ImportSettings,
    *,
    source: Path,
    origin: Origin,
    cache: CachePath,
    output: Path,
    compute: Compute = Compute(),
) -> ImportResult:
    """Publish the transcoder in ``source``, files of ``origin``, at ``output``; return at once if it is there already.

    ``cache`` is of the language model it was trained on, and holds the site of every layer; ``settings.site`` names
    them where the files do not. Raises the errors of reading the files, ArtifactMismatch if the cache lacks sites or
    has them of other widths, SettingsError if the sites are not known.
    """
    with reopen_cache(cache, output) as opened:
        source = _folder_of_files(source, origin)
        checksums = _checksums(source, origin)
        request = {
            "imported": {"origin": origin, "files": checksums},
            "settings": settings.model_dump(mode="json"),
            "cache": opened.reference,
        }
        foreign = _READERS[origin](source)
        sites = _choose_sites(settings.site, foreign, opened, source)
        kind = CROSS_LAYER_KIND if isinstance(foreign, ForeignLayers) else KIND
        with Draft(output, kind, request) as draft:
            if not draft.published:
                transcoder = foreign.build(source)
                save_weights(output / WEIGHTS, transcoder)
                with compute.opened() as device:
                    split, scores = _measure(transcoder.to(device), opened, sites, settings.rows)
                draft.publish(
                    {
                        "format": ARTIFACT_FORMATS[kind],
                        "model": opened.manifest.model,
                        "inputs": {"cache": opened.reference, "imported": checksums},
                        "origin": {
                            "format": origin,
                            "model_name": foreign.model_name,
                            "facts": foreign.facts,
                            **_firing_rates(foreign),
                        },
                        "architecture": foreign.recorded_architecture,
                        "precision": "float32",
                        "notes": _notes(foreign, scores, opened, sites),
                        "versions": describe_versions(),
                        **(_of_layers if kind == CROSS_LAYER_KIND else _of_one_layer)(transcoder, sites, split, scores),
                    },
                    [WEIGHTS],
                )
        return read_result(output)


_Scores = Mapping[str, HeldoutScore]
_NO_STEPS = {"steps": 0, "rows": 0}
"""No step was taken here, and how many were elsewhere the files do not say."""


def _of_one_layer(transcoder: Transcoder, sites: Sequence[Site], split: str, scores: _Scores) -> dict[str, Any]:
    """Return what a manifest of a transcoder of one layer has of its own."""
    (score,) = scores.values()
    return {
        "site": sites[0].as_json(),
        "d_sae": transcoder.d_sae,
        "normalisation": {"kind": "none", "scale_in": 1.0, "scale_out": 1.0},
        "metrics": {**_NO_STEPS, **({split: score.record()} if split == "heldout" else {})},
        "measured": {"split": split, "fvu": score.fvu, "l0": score.l0, "n_rows": score.n_rows},
    }


def _of_layers(transcoder: Transcoder, sites: Sequence[Site], split: str, scores: _Scores) -> dict[str, Any]:
    """Return what a manifest of a cross-layer transcoder has of its own."""
    layers = [{"site": name, **score.record()} for name, score in scores.items()]
    return {
        "sites": [site.as_json() for site in sites],
        "d_sae": transcoder.d_sae // len(sites),
        "normalisation": {"kind": "none", "scale_in": [1.0] * len(sites), "scale_out": [1.0] * len(sites)},
        "learnt_from": None,
        "metrics": _NO_STEPS,
        "layers": layers if split == "heldout" else [],
        "measured": {"split": split, "layers": layers},
    }


def read_result(path: Path) -> ImportResult:
    """Return what an imported transcoder says. Raises the errors of ``read_either_manifest``."""
    manifest = read_either_manifest(path)
    assert manifest.measured is not None, "an import is measured"
    measured = manifest.measured.layers or [manifest.measured.as_json()]
    return ImportResult(
        path=path,
        sites=[site.name for site in manifest.sites],
        d_sae=manifest.d_sae,
        fvu=[layer["fvu"] for layer in measured],
        l0=[layer["l0"] for layer in measured],
        notes=manifest.notes,
    )


def _folder_of_files(source: Path, origin: Origin) -> Path:
    """Return the folder that holds an origin's files: ``source``, or the only folder in it that does.

    Raises ArtifactMismatch with those to choose from, if there are several.
    """
    names = _IN_FOLDERS.get(origin)
    if names is None or any((source / name).exists() for name in names):
        return source
    inside = sorted((path.parent for path in matching(source, f"*/{names[0]}")), key=lambda one: by_number(one.name))
    if len(inside) > 1:
        named = ", ".join(one.name for one in inside)
        raise ArtifactMismatch(
            f"{source}: holds {len(inside)} transcoders, {named}; one is imported at a time: give one, as {inside[0]}"
        )
    return inside[0] if inside else source


def _checksums(source: Path, origin: Origin) -> dict[str, str]:
    """Return the checksum of every file that is read, by name: they say what was imported, wherever it lay.

    Raises ArtifactMissing with all that are not there, ArtifactMismatch for a file that is known to be of another
    format, ArtifactCorrupt for one of an export of ours that has changed since.
    """
    if not source.exists():
        raise ArtifactMissing(f"{source}: there is nothing to import; check the path")
    if source.suffix == ".npz" and origin != "gemma-scope":
        raise ArtifactMismatch(f"{source}: holds arrays of NumPy, as Gemma Scope's files do; give --from gemma-scope")
    if origin == "circuit-tracer" and source.is_dir():
        files = cross_layer.files(source)
    else:
        names = _IN_FOLDERS.get(origin)
        files = [source] if names is None else [source / name for name in names]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ArtifactMissing(f"{', '.join(missing)}: not there; --from {origin} wants: {ORIGINS[origin]}")
    if origin in _BESIDE and (beside := _BESIDE[origin](source)).is_file():
        files.append(beside)
    for path in files:
        refuse_changed(path, largest=None)  # an export of ours lists its files
    return {path.name: checksum_file(path) for path in files}


def _choose_sites(
    named: str | None, foreign: Foreign | ForeignLayers, cache: ActivationCache, source: Path
) -> list[Site]:
    """Return a site of the cache for each layer."""
    there = "\n".join(f"  {site.name}: {site.hook_in} to {site.hook_out}" for site in cache.sites.values())
    several = foreign.n_layers > 1
    if named is not None:
        sites = _named_sites([one.strip() for one in named.split(",")], foreign.n_layers, cache, there)
    elif foreign.hooks is None:
        wanted = f"{foreign.n_layers} sites" if several else "a site"
        raise SettingsError(
            f"{source}: does not say which hooks it belongs to; name {wanted} of {cache.path} with "
            f"{'--site A,B,…, lowest layer first' if several else '--site'}:\n{there}"
        )
    else:
        fitting = [_sites_of(pair, cache) for pair in foreign.hooks]
        missing = [pair for pair, some in zip(foreign.hooks, fitting, strict=True) if not some]
        if missing:
            raise ArtifactMismatch(
                f"{cache.path}: has no site from {_listed([f'{read} to {written}' for read, written in missing])}, "
                f"where {source} belongs; cache {'them' if several else 'it'} with --hooks "
                f"{missing[0][0]}:{missing[0][1]}{' and so on' if several else ''}, or, if a site holds the same under "
                f"another name, give it with --site{', all of them, lowest layer first' if several else ''}:\n{there}"
            )
        sites = [some[0] for some in fitting]
    if wrong := [
        f"{site.name} holds {site.d_in} and {site.d_out}" for site in sites if (site.d_in, site.d_out) != foreign.widths
    ]:
        raise ArtifactMismatch(
            f"{source}: maps width {foreign.widths[0]} to {foreign.widths[1]}, but of {cache.path} {'; '.join(wrong)}; "
            "give a cache of the model it was trained on"
        )
    return sites


def _named_sites(names: Sequence[str], n_layers: int, cache: ActivationCache, there: str) -> list[Site]:
    problems = [f"there is no {name!r}" for name in names if name not in cache.sites]
    if len(names) != n_layers:
        problems.append(
            f"{len(names)} {'site is' if len(names) == 1 else 'sites are'} named, the files are of {n_layers} "
            f"{'layer' if n_layers == 1 else 'layers'}"
        )
    layers = [mlp_layer(cache.sites[name]) for name in names if name in cache.sites]
    known = [layer for layer in layers if layer is not None]
    if known != sorted(set(known)):
        problems.append(f"they are of layers {', '.join(map(str, known))}; each is wanted once, lowest first")
    if problems:
        raise SettingsError(f"--site {','.join(names)}: {'; '.join(problems)}; {cache.path} has:\n{there}")
    return [cache.sites[name] for name in names]


def _sites_of(hooks: tuple[str, str], cache: ActivationCache) -> list[Site]:
    """Return the sites of a cache that hold the vectors of these hooks; first those with the very same names.

    Other tools know some of our hooks under a name of ``HookedTransformer``: where no norm follows the MLP,
    ``blocks.3.hook_mlp_out`` is ``blocks.3.mlp.hook_out``.
    """
    model = cache.manifest.model

    def usual(pair: tuple[str, str]) -> tuple[str, ...]:
        return tuple(hooked_transformer_name(hook, model) or hook for hook in pair)

    pairs = {name: (site.hook_in, site.hook_out) for name, site in cache.sites.items()}
    same = [name for name, pair in pairs.items() if usual(pair) == usual(hooks)]
    return [cache.sites[name] for name in sorted(same, key=lambda name: pairs[name] != hooks)]


def _measure(transcoder: Transcoder, cache: ActivationCache, sites: Sequence[Site], n_rows: int) -> tuple[str, _Scores]:
    """Return the split that was measured, held-out rows if there are any, and the score of each layer's output."""
    split = "heldout" if "heldout" in cache.manifest.splits else "train"
    batches = iter_sites_once(
        cache.split(split), sites, batch_rows=_BATCH_ROWS, device=transcoder.W_enc.device, max_rows=n_rows
    )
    if isinstance(transcoder, CrossLayerTranscoder):
        return split, score_layers(transcoder, [site.name for site in sites], batches)
    name = sites[0].name
    return split, {name: evaluate(predictor(transcoder), (batch[name] for batch in batches))}


def _firing_rates(foreign: ForeignRecord) -> dict[str, Any]:
    """Return L0 and the number of silent features by the files' own firing rates; nothing where there are none."""
    if foreign.log_sparsity is None:
        return {}
    rates = 10 ** foreign.log_sparsity.double()
    return {"firing": {"l0": float(rates.sum()), "silent": int((rates <= SILENT).sum())}}


def _notes(
    foreign: Foreign | ForeignLayers, scores: _Scores, cache: ActivationCache, sites: Sequence[Site]
) -> list[str]:
    notes = [*foreign.notes, *_note_other_hooks(foreign, sites, cache)]
    model = cache.manifest.model
    if firing := _firing_rates(foreign).get("firing"):
        now = sum(score.l0 for score in scores.values())
        notes.append(
            f"by the firing rates beside its files L0 was {firing['l0']:.1f} when it was trained, "
            f"{firing['silent']:,} features silent; on the cache's rows it is {now:.1f}"
        )
    processing = model.get("processing", "raw")
    if foreign.processing not in (None, processing):
        notes.append(
            f"it was trained on a model of processing {foreign.processing}, the cache holds {processing}: its outputs "
            "are then off by what centring takes away"
        )
    name = str(model.get("name"))
    if foreign.model_name is not None and foreign.model_name.split("/")[-1] != name.split("/")[-1]:
        notes.append(f"its files name the model {foreign.model_name}, the cache {name}")
    poor = [f"{site} {one.fvu:.3f}" for site, one in scores.items() if one.fvu is not None and one.fvu > POOR_FVU]
    if poor:
        layers = f" in {len(poor)} of {len(scores)} layers" if len(scores) > 1 else ""
        notes.append(
            f"FVU on the cache's rows is no better than a constant's{layers} ({_listed(poor)}): "
            f"{'if that is in all, ' if len(poor) < len(scores) else ''}this is not the model, site or processing it "
            "was trained on"
        )
    return notes


def _note_other_hooks(foreign: Foreign | ForeignLayers, sites: Sequence[Site], cache: ActivationCache) -> list[str]:
    """Return a sentence if sites were named and have other hooks than the files say."""
    if foreign.hooks is None:
        return []
    pairs = zip(foreign.hooks, sites, strict=True)
    others = [(hooks, site) for hooks, site in pairs if site not in _sites_of(hooks, cache)]
    if not others:
        return []
    (hook_in, hook_out), site = others[0]
    more = f", and {len(others) - 1} more layers are named like it" if len(others) > 1 else ""
    return [
        f"its files say that it reads {hook_in} and writes {hook_out}; {site.name}, which was named, has "
        f"{site.hook_in} and {site.hook_out}{more}. Where these hold other vectors (hook_normalized is before a norm's "
        "gain and bias, mlp.hook_in behind them), its features are not the ones that were trained"
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
