"""The stage ``pipeline import``: another tool's transcoder as one of ours, ready to be analysed and evaluated.

Files of other tools say too little of the language model they belong to, so a cache of that model says it: the imported
transcoder gets the identity of its model and the hooks of one of its sites. Whether it belongs there is then a matter
of numbers, and they are measured at once: FVU and L0 on the cache's rows are part of the artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.formats import circuit_tracer, dictionary_learning, gemma_scope, reference, saelens, sparsify
from tailrace.pipeline.formats.foreign import Foreign
from tailrace.pipeline.formats.hooks import hooked_transformer_name
from tailrace.pipeline.formats.settings import ORIGINS, ImportSettings, Origin
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.artifact import checksum_file
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import (
    FORMAT_VERSION,
    KIND,
    WEIGHTS,
    describe_versions,
    load_transcoder,
    read_transcoder_manifest,
    save_weights,
)
from tailrace.training.loop.evaluate import HeldoutScore, evaluate, predictor
from tailrace.training.rows.batches import iter_once

_READERS: dict[Origin, Callable[[Path], Foreign]] = {
    "saelens": saelens.read,
    "circuit-tracer": circuit_tracer.read,
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
SILENT = 1e-9
"""Rates up to this are of features that never fired: files have log10 of the rate plus 1e-10."""
POOR_FVU = 0.9
"""Above this, a transcoder is taken not to belong to the rows it was measured on."""


@dataclass(frozen=True)
class ImportResult:
    """A transcoder that was imported."""

    path: Path
    site: str
    d_sae: int
    fvu: float | None
    """On rows of the cache; None if the outputs do not vary."""
    l0: float
    notes: list[str]
    """Sentences a user should read."""


def run(
    settings: ImportSettings, *, source: Path, origin: Origin, cache: Path, output: Path, device: str = "cpu"
) -> ImportResult:
    """Publish the transcoder in ``source``, files of ``origin``, at ``output``; return at once if it is there already.

    ``cache`` is of the language model it was trained on, and holds its site. Raises the errors of reading the files,
    ArtifactMismatch if the cache has no such site or one of other widths, SettingsError if the site is not told.
    """
    opened = open_cache(cache)
    checksums = _checksums(source, origin)
    request = {
        "imported": {"origin": origin, "files": checksums},
        "settings": settings.model_dump(mode="json"),
        "cache": opened.reference,
    }
    foreign = _READERS[origin](source)
    transcoder = foreign.build(source)
    site = _choose_site(settings.site, foreign, transcoder, opened, source)
    with Draft(output, KIND, request) as draft:
        if not draft.published:
            save_weights(output / WEIGHTS, transcoder)
            split = "heldout" if "heldout" in opened.manifest.splits else "train"
            score = _measure(transcoder.to(torch.device(device)), opened.split(split), site, settings.rows)
            draft.publish(
                {
                    "format": FORMAT_VERSION,
                    "model": opened.manifest.model,
                    "inputs": {"cache": opened.reference, "imported": checksums},
                    "origin": {
                        "format": origin,
                        "model_name": foreign.model_name,
                        "facts": foreign.facts,
                        **_firing_rates(foreign),
                    },
                    "site": asdict(site),
                    "d_sae": transcoder.d_sae,
                    "architecture": foreign.recorded_architecture,
                    "normalisation": {"kind": "none", "scale_in": 1.0, "scale_out": 1.0},
                    "precision": "float32",
                    # No step was taken here, and how many were elsewhere the files do not say.
                    "metrics": {"steps": 0, "rows": 0, **({split: score.record()} if split == "heldout" else {})},
                    "measured": {"split": split, "fvu": score.fvu, "l0": score.l0, "n_rows": score.n_rows},
                    "notes": _notes(foreign, score, opened, site),
                    "versions": describe_versions(),
                },
                [WEIGHTS],
            )
    return read_result(output)


def read_result(path: Path) -> ImportResult:
    """Return what an imported transcoder says. Raises the errors of ``read_transcoder_manifest``."""
    manifest = read_transcoder_manifest(path)
    load_transcoder(path)
    score = manifest["measured"]
    return ImportResult(
        path, manifest["site"]["name"], manifest["d_sae"], score["fvu"], score["l0"], list(manifest["notes"])
    )


def _checksums(source: Path, origin: Origin) -> dict[str, str]:
    """Return the checksum of every file that is read, by name: they say what was imported, wherever it lay.

    Raises ArtifactMissing with all that are not there, ArtifactMismatch for a file that is known to be of another
    format.
    """
    if not source.exists():
        raise ArtifactMissing(f"{source}: there is nothing to import; check the path")
    if source.suffix == ".npz" and origin != "gemma-scope":
        raise ArtifactMismatch(f"{source}: holds arrays of NumPy, as Gemma Scope's files do; give --from gemma-scope")
    names = _IN_FOLDERS.get(origin)
    files = [source] if names is None else [source / name for name in names]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ArtifactMissing(f"{', '.join(missing)}: not there; --from {origin} wants: {ORIGINS[origin]}")
    if origin in _BESIDE and (beside := _BESIDE[origin](source)).is_file():
        files.append(beside)
    return {path.name: checksum_file(path) for path in files}


def _choose_site(
    named: str | None, foreign: Foreign, transcoder: Transcoder, cache: ActivationCache, source: Path
) -> Site:
    there = "\n".join(f"  {site.name}: {site.hook_in} to {site.hook_out}" for site in cache.sites.values())
    if named is None:
        if foreign.hook_in is None or foreign.hook_out is None:
            raise SettingsError(
                f"{source}: does not say which hooks it belongs to; name a site of {cache.path} with --site:\n{there}"
            )
        hooks = (foreign.hook_in, foreign.hook_out)
        fitting = sites_of(hooks, cache)
        if not fitting:
            raise ArtifactMismatch(
                f"{cache.path}: has no site from {hooks[0]} to {hooks[1]}, where {source} belongs; cache it with "
                f"--hooks {hooks[0]}:{hooks[1]}, or, if one of these is the same under another name, give it with "
                f"--site:\n{there}"
            )
        site = fitting[0]
    elif named in cache.sites:
        site = cache.sites[named]
    else:
        raise SettingsError(f"{cache.path}: has no site {named!r}; it has:\n{there}")
    if (site.d_in, site.d_out) != (transcoder.d_in, transcoder.d_out):
        raise ArtifactMismatch(
            f"{source}: maps width {transcoder.d_in} to {transcoder.d_out}, site {site.name} of {cache.path} holds "
            f"{site.d_in} and {site.d_out}; give a cache of the model it was trained on"
        )
    return site


def sites_of(hooks: tuple[str, str], cache: ActivationCache) -> list[Site]:
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


def _measure(transcoder: Transcoder, split: CacheSplit, site: Site, n_rows: int) -> HeldoutScore:
    batches = iter_once(split, site, batch_rows=_BATCH_ROWS, max_rows=n_rows, device=transcoder.W_enc.device)
    return evaluate(predictor(transcoder), batches)


def _firing_rates(foreign: Foreign) -> dict[str, Any]:
    """Return L0 and the number of silent features by the files' own firing rates; nothing where there are none."""
    if foreign.log_sparsity is None:
        return {}
    rates = 10 ** foreign.log_sparsity.double()
    return {"firing": {"l0": float(rates.sum()), "silent": int((rates <= SILENT).sum())}}


def _notes(foreign: Foreign, score: HeldoutScore, cache: ActivationCache, site: Site) -> list[str]:
    notes = [*foreign.notes, *_note_other_hooks(foreign, site, cache)]
    if firing := _firing_rates(foreign).get("firing"):
        notes.append(
            f"by the firing rates beside its files L0 was {firing['l0']:.1f} when it was trained, "
            f"{firing['silent']:,} features silent; on the cache's rows it is {score.l0:.1f}"
        )
    processing = cache.manifest.model.get("processing", "raw")
    if foreign.processing not in (None, processing):
        notes.append(
            f"it was trained on a model of processing {foreign.processing}, the cache holds {processing}: its outputs "
            "are then off by what centring takes away"
        )
    notes += note_other_name(foreign.model_name, cache)
    if score.fvu is not None and score.fvu > POOR_FVU:
        notes.append(
            f"FVU is {score.fvu:.3f} on the cache's rows, no better than a constant: this is not the model, site or "
            "processing it was trained on"
        )
    return notes


def _note_other_hooks(foreign: Foreign, site: Site, cache: ActivationCache) -> list[str]:
    """Return a sentence if the site was named and has other hooks than the files say."""
    hooks = (foreign.hook_in, foreign.hook_out)
    if hooks[0] is None or hooks[1] is None or site.name in {one.name for one in sites_of((hooks[0], hooks[1]), cache)}:
        return []
    return [
        f"its files say that it reads {hooks[0]} and writes {hooks[1]}; {site.name}, which was named, has "
        f"{site.hook_in} and {site.hook_out}. Where these hold other vectors (hook_normalized is before a norm's gain "
        "and bias, mlp.hook_in behind them), its features are not the ones that were trained"
    ]


def note_other_name(model_name: str | None, cache: ActivationCache) -> list[str]:
    """Return a sentence if the files name another language model than the cache, whoever published it."""
    name = str(cache.manifest.model.get("name"))
    if model_name is None or model_name.split("/")[-1] == name.split("/")[-1]:
        return []
    return [f"its files name the model {model_name}, the cache {name}"]
