"""``pipeline info``: any artifact at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from tailrace.analysis.evaluate.recovered import recorded_share
from tailrace.pipeline.artifacts.listing import bytes_on_disk, known_facts, shown_facts
from tailrace.pipeline.artifacts.manifests import (
    CircuitManifest,
    DashboardManifest,
    DrawManifest,
    EvaluationManifest,
    ExportManifest,
    LayerSetManifest,
    SweepManifest,
)
from tailrace.pipeline.shared.units import size
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import (
    JSON,
    MANIFEST,
    REQUEST,
    DerivedManifest,
    Manifest,
    Record,
    published_kind,
    read_sealed,
)
from tailrace.storage.cache_format import KIND, PROVENANCE, SPLITS, Site
from tailrace.storage.errors import ArtifactMissing
from tailrace.storage.generations import Generations, refuse_generation
from tailrace.storage.names import by_number, is_being_written, matching
from tailrace.storage.tables import TableRecord, TablesManifest
from tailrace.training.architectures.manifest import (
    CHECKPOINTS,
    AnyTranscoderManifest,
    CrossLayerManifest,
    Scores,
    TranscoderManifest,
)


class _Request(Record):
    """What an unfinished artifact was asked to be, as far as it is shown."""

    settings: dict[str, JSON] = Field(default_factory=dict)
    runs: dict[str, JSON] = Field(default_factory=dict)


_UNFINISHED = "unfinished: run the command that makes it again to continue"
_BEING_WRITTEN = "unfinished: another process is writing it"


def summarise(path: Path, generation: int | None = None) -> dict[str, Any]:
    """Return the few things one wants to know of what lies at ``path``; ``describe`` has everything.

    Raises ArtifactMissing if nothing does.
    """
    described = describe(path, generation)
    if "request" in described and "state" in described:
        return dict(_summarise_draft(described))
    if (kind := described.get("kind")) == KIND:
        return dict(_summarise_cache(described))
    if not isinstance(kind, str) or kind not in SUMMARIES:
        return described
    manifest, summary = SUMMARIES[kind]
    return dict(summary(manifest.read(path)))


def describe(path: Path, generation: int | None = None) -> dict[str, Any]:
    """Return what lies at ``path`` as names and values, ready to be printed or dumped as JSON.

    Of a cache, ``generation`` is described, by default the newest. Raises ArtifactMissing if nothing lies there, and
    ArtifactMismatch if a generation is named of what is no cache.
    """
    if published_kind(path) == KIND:
        return dict(_describe_cache(open_cache(path, generation)))
    refuse_generation(path, generation)
    if not (path / MANIFEST).exists():
        if (path / REQUEST).exists():
            request = _Request.read_file(path / REQUEST).as_json()
            return {
                "state": _BEING_WRITTEN if is_being_written(path) else _UNFINISHED,
                **_progress(path, request),
                "request": request,
            }
        if inside := matching(path, f"*/{MANIFEST}"):
            return {
                "state": f"a folder of {len(inside)} artifacts; name one of them, or list all with pipeline ls",
                **{entry.parent.name: read_sealed(entry).get("kind") for entry in inside},
            }
        raise ArtifactMissing.at(path)
    manifest = read_sealed(path / MANIFEST)
    return {name: value for name, value in manifest.items() if name not in ("files", "digest")}


def _progress(draft: Path, request: dict[str, JSON]) -> dict[str, Any]:
    """Return how far an unfinished cache or training run has come; nothing for what is made in one go."""
    found = known_facts(draft, {}, request)
    from tailrace.training.loop.checkpoint import (
        Checkpoints,  # loads torch, which no finished artifact needs to be shown
    )

    if (draft / CHECKPOINTS).is_dir():
        return {**found, "steps kept": max(Checkpoints(draft / CHECKPOINTS).steps(), default=0)}
    return {"finished units": found["units"]} if "units" in found else found


_ASKED = ("architecture", "site", "d_sae", "lr", "steps", "rows", "epochs", "model", "dataset", "layers", "hooks")
"""Settings by which one knows an unfinished artifact."""


def _summarise_draft(described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "state", described["state"]
    if "step" in described:
        yield "done", shown_facts(described)
    yield from ((name, described[name]) for name in ("steps kept", "finished units") if name in described)
    request = described["request"]
    if "runs" in request:
        yield "runs", len(request["runs"])
    settings = request.get("settings", request)
    for name in (name for name in _ASKED if settings.get(name)):
        value = settings[name]
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else _kind(value)
    yield "everything else", "--json"


def _kind(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, others = value.get("kind"), {name: one for name, one in value.items() if name != "kind" and one}
    return ", ".join([str(kind), *(name if one is True else f"{name} {one}" for name, one in others.items())])


def _describe_cache(cache: ActivationCache) -> Iterator[tuple[str, Any]]:
    manifest = cache.manifest
    yield "kind", manifest.kind
    yield "cache id", f"{cache.cache_id}, generation {cache.generation}"
    yield "model", f"{manifest.model['name']} ({manifest.model.get('dtype', '?')})"
    yield "text", manifest.text.get("dataset") or manifest.request.get("dataset")
    yield "context length", cache.layout.context_length
    yield "rows per shard", cache.layout.shard_rows
    for name in (name for name in SPLITS if name in manifest.splits):
        split = cache.split(name)
        yield f"{name} rows", split.n_rows
        yield f"{name} contexts", split.n_contexts
        if n_bad := manifest.splits[name].counts.get("bad_rows"):
            yield f"{name} bad rows", f"{n_bad:,}, passed over"
    sums = cache.split("train").output_statistics()
    for site in sorted(cache.sites.values(), key=lambda site: by_number(site.name)):
        statistics = sums[site.name]
        yield (
            f"site {site.name}",
            f"{_hooks_of(site)}, {site.dtype}; "
            f"mean output norm {statistics.mean_norm:.4g}, "
            f"largest 1 % of rows hold {statistics.energy_share():.0%} of the output energy",
        )
    yield "bytes on disk", bytes_on_disk(cache.path)
    if (kept := Generations(cache.path)).newest:
        yield "generations", list(_generations(kept))
    yield "provenance", ", ".join(PROVENANCE)
    epochs = [manifest.parent.name for manifest in matching(cache.path / "epochs", f"*/{MANIFEST}")]
    if epochs:
        yield "materialised epochs", ", ".join(epochs)


def _generations(kept: Generations) -> Iterator[dict[str, Any]]:
    """Yield what each generation that is kept holds, and the bytes that it alone keeps on the disk."""
    freed = 0
    for at in kept.manifests:
        number = at.generation
        before, freed = freed, 0 if number == kept.newest else kept.bytes_freed(number + 1)
        yield {
            "generation": number,
            "change": at.change,
            "since": datetime.fromtimestamp(kept.since(number)).astimezone().isoformat(timespec="minutes"),
            "rows": {name: at.splits[name].n_rows for name in SPLITS if name in at.splits},
            "sites": [site.name for site in at.format.sites],
            "newest": number == kept.newest,
            "prune_frees": freed - before if number < kept.newest else None,
        }


def _summarise_cache(described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in described.items():
        if name != "generations":
            yield name, value
            continue
        for one in value:
            rows = ", ".join(f"{n_rows:,} {split} rows" for split, n_rows in one["rows"].items())
            sites = ", ".join(sorted(one["sites"], key=by_number))
            needs = "the newest" if one["newest"] else f"pruning it frees {size(one['prune_frees'])}"
            yield f"generation {one['generation']}", f"{rows} of {sites}, {one['change']} {one['since']}; {needs}"


def _hooks_of(site: Site) -> str:
    """Return a site's hooks with their widths."""
    if len(site.sides) == 1:
        return f"{site.hook_in} ({site.d_in})"
    return f"{site.hook_in} ({site.d_in}) -> {site.hook_out} ({site.d_out})"


def _origin(manifest: DerivedManifest, sites: Iterable[Site]) -> Iterator[tuple[str, Any]]:
    """What all artifacts made from rows have in common: where they come from."""
    yield from _model(manifest)
    for site in sites:
        yield f"site {site.name}", _hooks_of(site)
    if cache := manifest.inputs.cache:
        yield "cache id", f"{cache.cache_id}, generation {cache.generation}"
    else:
        yield "rows", "live, straight from the model"


def _model(manifest: DerivedManifest) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest.kind
    yield "model", f"{manifest.model['name']} ({manifest.model.get('dtype', '?')})"


def _summarise_transcoder(manifest: TranscoderManifest) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, manifest.sites)
    yield "architecture", _architecture(manifest)
    yield "features", manifest.d_sae
    yield _made(manifest)
    if limits := manifest.learnt_from:
        sides = f"{limits.longest_in:.3g} and {limits.longest_out:.3g}"
        yield "learnt from", f"rows whose input and output are at most {sides} long"
    if heldout := manifest.metrics.heldout:
        yield "held out", f"{_score(heldout)}, over {heldout['n_rows']:,} rows"
    yield "everything else", "--json"


def _summarise_cross_layer(manifest: CrossLayerManifest) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [])
    yield "layers", f"{len(manifest.sites)}: {', '.join(site.name for site in manifest.sites)}"
    yield "architecture", _architecture(manifest)
    yield "features", f"{manifest.d_sae:,} a layer, each writing to its own layer and all later ones"
    yield _made(manifest)
    if limits := manifest.learnt_from:
        longest = ", ".join(f"{entry.longest_out:.3g}" for entry in limits.values())
        yield "learnt from", f"rows whose outputs are at most {longest} long, and inputs likewise"
    for layer in manifest.layers:
        yield f"held out {layer['site']}", _score(layer)
    yield "everything else", "--json"


def _made(manifest: AnyTranscoderManifest) -> tuple[str, Any]:
    if manifest.origin:
        return "imported from", manifest.origin.format
    return "trained", f"{manifest.metrics.steps:,} steps, {manifest.metrics.rows:,} rows"


def _architecture(manifest: AnyTranscoderManifest) -> str:
    choices = sorted(manifest.architecture.model_dump(exclude_unset=True, exclude={"kind"}).items())
    on = [name if value is True else f"{name} {value}" for name, value in choices if value]
    return ", ".join([manifest.architecture.kind, *on])


def _score(heldout: Scores) -> str:
    ordinary = heldout.get("fvu_ordinary")
    also = "" if ordinary is None else f" ({ordinary:.4g} on rows it may learn from)"
    fvu = "undefined" if heldout["fvu"] is None else f"{heldout['fvu']:.4g}"  # of outputs that do not vary
    return f"FVU {fvu}{also}, L0 {heldout['l0']:.1f}, dead features {heldout['dead_fraction']:.1%}"


def _summarise_tables(manifest: TablesManifest) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [manifest.site])
    yield "transcoder", manifest.inputs.transcoder.digest
    yield "rows read", _rows_read(manifest)
    yield from _tables(manifest.tables)
    yield "everything else", "--json"


def _rows_read(manifest: TablesManifest) -> str:
    asked, drawn = manifest.settings["rows"], manifest.inputs.rows
    split = "" if manifest.inputs.cache is None else f" {manifest.settings['split']}"
    if asked is not None and drawn is None:  # live, or of a release that read the first of a cache
        return f"the first {asked:,}{split} rows"
    if drawn is None or "n_rows" not in drawn:  # as many as there are, or more, were asked for
        return f"all{split} rows"
    return f"{drawn['n_rows']:,} of {drawn.get('of_rows', 0):,}{split} rows, drawn: {drawn.get('drawn')}"


def _tables(tables: Mapping[str, TableRecord]) -> Iterator[tuple[str, Any]]:
    for name, table in sorted(tables.items()):
        yield f"table {name}", f"{table.n_rows:,} rows"


def _summarise_sweep(manifest: SweepManifest) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [])
    statuses = Counter(run.status for run in manifest.runs)
    yield "runs", ", ".join(f"{n:,} {status}" for status, n in sorted(statuses.items(), reverse=True))
    yield "table runs", f"{len(manifest.runs):,} rows"
    yield "everything else", "--json"


def _summarise_evaluation(manifest: EvaluationManifest) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, manifest.sites.values())
    first, split = manifest.scores[0], manifest.request["settings"]["split"]
    yield "run on", f"{first['n_predictions']:,} tokens of {first['n_contexts']:,} {split} contexts"
    yield "cross entropy", f"{first['ce_original']:.4f} nats per token"
    for score in manifest.scores:
        share = recorded_share(score)
        recovered = "" if share is None else f", {share:.1%} recovered"
        yield f"with {score['name']}", f"{score['spliced']['ce']:.4f}{recovered}, KL {score['spliced']['kl']:.4f}"
    yield from _tables(manifest.tables)
    yield "everything else", "--json"


def _summarise_layers(manifest: LayerSetManifest) -> Iterator[tuple[str, Any]]:
    yield from _model(manifest)
    yield "layers", len(manifest.transcoders)
    yield "how good each is", "the table layers"
    yield "everything else", "--json"


def _summarise_dashboard(manifest: DashboardManifest) -> Iterator[tuple[str, Any]]:
    yield from _model(manifest)
    yield f"site {manifest.site.name}", _hooks_of(manifest.site)
    yield "features", manifest.n_features
    yield "open", "index.html"
    yield "everything else", "--json"


def _summarise_circuit(manifest: CircuitManifest) -> Iterator[tuple[str, Any]]:
    root = manifest.root
    yield from _model(manifest)
    yield "root", f"{root['text']}, {root['value']:.4g}"
    yield "terms", f"{root['n_terms']:,}, which miss it by {root['incompleteness']:.1e} of their magnitudes"
    yield "open", "index.html"
    yield "everything else", "--json"


def _summarise_export(manifest: ExportManifest) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest.kind
    yield "written for", manifest.to
    yield "files", len(manifest.files)
    for note in manifest.notes:
        yield "note", note
    yield "everything else", "--json"


def _summarise_comparison(manifest: DrawManifest) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest.kind
    yield "items", manifest.n_items
    yield "digest of the key", manifest.commitment
    yield "open", "rate.html"


_Summary = tuple[type[Manifest], Callable[[Any], Iterable[tuple[str, Any]]]]

SUMMARIES: dict[str, _Summary] = {
    manifest.of_kind: (manifest, summary)
    for manifest, summary in (
        (TranscoderManifest, _summarise_transcoder),
        (CrossLayerManifest, _summarise_cross_layer),
        (LayerSetManifest, _summarise_layers),
        (DashboardManifest, _summarise_dashboard),
        (CircuitManifest, _summarise_circuit),
        (ExportManifest, _summarise_export),
        (DrawManifest, _summarise_comparison),
        (TablesManifest, _summarise_tables),
        (SweepManifest, _summarise_sweep),
        (EvaluationManifest, _summarise_evaluation),
    )
}
"""The manifest of a kind, and what is shown of it."""
