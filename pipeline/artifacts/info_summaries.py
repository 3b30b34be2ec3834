"""What ``pipeline info`` shows of each kind of artifact: the few things one wants to know, as names and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tailrace.storage.cache_format import Site


def hooks_of(site: Site) -> str:
    """Return a site's hooks with their widths."""
    if len(site.sides) == 1:
        return f"{site.hook_in} ({site.d_in})"
    return f"{site.hook_in} ({site.d_in}) -> {site.hook_out} ({site.d_out})"


def _origin(manifest: dict[str, Any], sites: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What all artifacts made from rows have in common: where they come from."""
    yield from _model(manifest)
    for site in (Site(**recorded) for recorded in sites):
        yield f"site {site.name}", hooks_of(site)
    if cache := manifest["inputs"].get("cache"):
        yield "cache id", f"{cache['cache_id']}, generation {cache['generation']}"
    else:
        yield "rows", "live, straight from the model"


def _model(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest["kind"]
    yield "model", f"{manifest['model']['name']} ({manifest['model'].get('dtype', '?')})"


def _glance_at_transcoder(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [manifest["site"]])
    yield "architecture", _architecture(manifest)
    yield "features", manifest["d_sae"]
    yield _made(manifest)
    if limits := manifest.get("learnt_from"):
        sides = f"{limits['longest_in']:.3g} and {limits['longest_out']:.3g}"
        yield "learnt from", f"rows whose input and output are at most {sides} long"
    if heldout := manifest["metrics"].get("heldout"):
        yield "held out", f"{_score(heldout)}, over {heldout['n_rows']:,} rows"
    yield "everything else", "--json"


def _glance_at_cross_layer(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [])
    sites = manifest["sites"]
    yield "layers", f"{len(sites)}: {', '.join(site['name'] for site in sites)}"
    yield "architecture", _architecture(manifest)
    yield "features", f"{manifest['d_sae']:,} a layer, each writing to its own layer and all later ones"
    yield _made(manifest)
    if limits := manifest.get("learnt_from"):
        longest = ", ".join(f"{one['longest_out']:.3g}" for one in limits.values())
        yield "learnt from", f"rows whose outputs are at most {longest} long, and inputs likewise"
    for layer in manifest["layers"]:
        yield f"held out {layer['site']}", _score(layer)
    yield "everything else", "--json"


def _made(manifest: dict[str, Any]) -> tuple[str, Any]:
    if origin := manifest.get("origin"):
        return "imported from", origin["format"]
    metrics = manifest["metrics"]
    return "trained", f"{metrics['steps']:,} steps, {metrics['rows']:,} rows"


def _architecture(manifest: dict[str, Any]) -> str:
    kind, choices = manifest["architecture"]["kind"], manifest["architecture"]
    on = [name if value is True else f"{name} {value}" for name, value in choices.items() if value and name != "kind"]
    return ", ".join([kind, *on])


def _score(heldout: dict[str, Any]) -> str:
    ordinary = heldout.get("fvu_ordinary")
    also = "" if ordinary is None else f" ({ordinary:.4g} on rows it may learn from)"
    fvu = "undefined" if heldout["fvu"] is None else f"{heldout['fvu']:.4g}"  # of outputs that do not vary
    return f"FVU {fvu}{also}, L0 {heldout['l0']:.1f}, dead features {heldout['dead_fraction']:.1%}"


def _glance_at_tables(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [manifest["site"]])
    yield "transcoder", manifest["inputs"]["transcoder"]["digest"]
    settings = manifest["request"]["settings"]
    split = "" if manifest["inputs"].get("cache") is None else f" {settings['split']}"
    yield "rows read", f"all{split} rows" if settings["rows"] is None else f"the first {settings['rows']:,}{split} rows"
    yield from _tables(manifest["tables"])
    yield "everything else", "--json"


def _tables(tables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, table in sorted(tables.items()):
        yield f"table {name}", f"{table['n_rows']:,} rows"


def _glance_at_sweep(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, [])
    statuses = Counter(one["status"] for one in manifest["runs"])
    yield "runs", ", ".join(f"{n:,} {status}" for status, n in sorted(statuses.items(), reverse=True))
    yield from _tables({"runs": {"n_rows": len(manifest["runs"])}})
    yield "everything else", "--json"


def _glance_at_evaluation(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _origin(manifest, manifest["sites"].values())
    first, split = manifest["scores"][0], manifest["request"]["settings"]["split"]
    yield "run on", f"{first['n_predictions']:,} tokens of {first['n_contexts']:,} {split} contexts"
    yield "cross entropy", f"{first['ce_original']:.4f} nats per token"
    for score in manifest["scores"]:
        share = score["ce_recovered"]
        recovered = "" if share is None else f", {share:.1%} recovered"
        yield f"with {score['name']}", f"{score['spliced']['ce']:.4f}{recovered}, KL {score['spliced']['kl']:.4f}"
    yield from _tables(manifest["tables"])
    yield "everything else", "--json"


def _glance_at_layers(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _model(manifest)
    yield "layers", len(manifest["transcoders"])
    yield "how good each is", "the table layers"
    yield "everything else", "--json"


def _glance_at_dashboard(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _model(manifest)
    yield f"site {manifest['site']['name']}", hooks_of(Site(**manifest["site"]))
    yield "features", manifest["n_features"]
    yield "open", "index.html"
    yield "everything else", "--json"


def _glance_at_circuit(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    root = manifest["root"]
    yield from _model(manifest)
    yield "root", f"{root['text']}, {root['value']:.4g}"
    yield "terms", f"{root['n_terms']:,}, which miss it by {root['incompleteness']:.1e} of their magnitudes"
    yield "open", "index.html"
    yield "everything else", "--json"


def _glance_at_export(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest["kind"]
    yield "written for", manifest["to"]
    yield "files", len(manifest["files"])
    for note in manifest["notes"]:
        yield "note", note
    yield "everything else", "--json"


def _glance_at_comparison(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "kind", manifest["kind"]
    yield "items", manifest["n_items"]
    yield "digest of the key", manifest["commitment"]
    yield "open", "rate.html"


GLANCES = {
    "transcoder": _glance_at_transcoder,
    "cross_layer_transcoder": _glance_at_cross_layer,
    "transcoders": _glance_at_layers,
    "dashboard": _glance_at_dashboard,
    "circuit": _glance_at_circuit,
    "export": _glance_at_export,
    "blind-comparison": _glance_at_comparison,
    "tables": _glance_at_tables,
    "sweep": _glance_at_sweep,
    "evaluation": _glance_at_evaluation,
}
