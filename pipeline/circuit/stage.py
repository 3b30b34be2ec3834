"""The stage ``pipeline circuit``: why a feature fires, or a token is predicted, on one prompt.

Runs the language model once on the prompt, with the transcoders beside it, and explains one quantity: exactly, term by
term; as the paths with the largest contributions; and as an attribution graph of everything that leads up to it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from tailrace.analysis.circuits import documents
from tailrace.analysis.circuits.attribution_graph import AttributionGraph, GraphSettings, build_graph, top_logits
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.filters import NodeFilter
from tailrace.analysis.circuits.influence import Pruned
from tailrace.analysis.circuits.path_graph import completed, graph_of_paths
from tailrace.analysis.circuits.paths import Path as CircuitPath
from tailrace.analysis.circuits.paths import SearchSettings, search_paths
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import Root, centred_logit_roots, decoder_root, feature_root, logit_root
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.analysis.circuits.viewer import viewer_document
from tailrace.analysis.dashboards.values import PART
from tailrace.pipeline.artifacts.manifests import CircuitManifest, DashboardManifest
from tailrace.pipeline.artifacts.transcoders import (
    PublishedTranscoder,
    TranscoderLayer,
    layers_of,
    open_tables,
    open_transcoders,
)
from tailrace.pipeline.cache.learnt_rows import LearntTokens
from tailrace.pipeline.cache.recorded_model import explained_passes
from tailrace.pipeline.circuit.cards import read_cards
from tailrace.pipeline.circuit.page import features_shown, render_page
from tailrace.pipeline.circuit.question import Question, check_askable, prompt_tokens, token_ids
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.circuit.traced import traced_layers, warn_of_poor_layers
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.shared.compute import Compute, say_once
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.shared.stage import MODEL_LIBRARIES, Made, publish_stage
from tailrace.pipeline.shared.units import duration, size
from tailrace.storage.artifact import published_file, write_atomically
from tailrace.storage.display import card, table
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS
from tailrace.storage.labels import labels_digest, read_labels
from tailrace.storage.tables import TablesManifest
from tailrace.storage.token_text import join_characters

KIND = CircuitManifest.of_kind
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]
CIRCUIT = "circuit.json"
"""Everything, in the schema of ``docs/guides/circuits.md``."""
VIEWER = "viewer.json"
"""The attribution graph for circuit-tracer's and Neuronpedia's viewers."""
PAGE = "index.html"
"""To look at in a browser."""
_N_FEATURES_SHOWN = 8
N_LIKELY = 5
"""Tokens of which it is said how likely they are to come next."""


@dataclass(frozen=True)
class CircuitResult:
    """A published circuit."""

    path: Path
    document: dict[str, Any] = field(repr=False)
    """What ``circuit.json`` holds."""

    def _repr_html_(self) -> str:
        root, texts = self.document["root"], [token["text"] for token in self.document["tokens"]]
        kinds = table(("made of", "adds"), root["by_kind"].items())
        graph = self.document["attribution_graph"] or {"nodes": []}
        features = [node for node in graph["nodes"] if node["kind"] == "feature" and node["influence"] is not None]
        strongest = sorted(features, key=lambda node: -node["influence"])[:_N_FEATURES_SHOWN]
        rows = [
            (f"layer {node['layer']}, feature {node['index']}", repr(texts[node["token"]]), f"{node['influence']:.1%}")
            for node in strongest
        ]
        listed = table(("strongest features", "on", "influence"), rows) if rows else ""
        facts = {"prompt": self.document["prompt"], "value": root["value"], "page": self.path / PAGE}
        return card(f"Circuit of {root['text']}", facts, kinds, listed)


def run(
    settings: CircuitSettings,
    question: Question,
    *,
    transcoders: Sequence[Path],
    output: Path,
    tables: Sequence[Path] = (),
    dashboard: Path | None = None,
    model: str | None = None,
    compute: Compute = Compute(),
) -> CircuitResult:
    """Publish the circuit that answers ``question``; return at once if it is there already.

    ``transcoders`` are transcoders, or folders that hold some, or one cross-layer transcoder; ``tables`` of some of
    them, given likewise, give their features' cards on the page, and ``dashboard`` is what these link to; ``model``
    says where the language model lies if it is not under its recorded name. Says what the circuit costs as soon as the
    graph's first features were timed, unless ``compute`` is quiet. Warns of layers whose transcoder explains next to
    nothing, where that is known. Raises SettingsError for a question that cannot be asked of these transcoders (a
    missing layer, a feature, token or logit that does not exist, a prompt of the BOS alone) and for a dashboard without
    their layers, ArtifactMismatch if what is given belongs to different models or tables, ModelError for a model that
    cannot be loaded or whose pass is not linear as assumed.
    """
    question.check()
    keep = NodeFilter.parse(settings.filter)
    given = open_transcoders(transcoders)
    traced = traced_layers(given)
    n_layers = max((int(one.manifest.model["n_layers"]) for one in given), default=0)
    check_askable(question, {layer: one.d_sae for layer, one in traced.items()}, n_layers, settings.missing_layers)
    warn_of_poor_layers(
        question,
        {layer: one.path for layer, one in traced.items()},
        {layer: one.heldout for layer, one in traced.items()},
    )
    known = open_tables(tables, traced)
    inputs: dict[str, Any] = {
        "transcoders": {one.site.name: {"digest": one.digest} for one in traced.values()},
        "tables": {
            one.site.name: {"digest": TablesManifest.read(known[layer]).digest}
            for layer, one in traced.items()
            if layer in known
        },
    }
    said = {layer: read_labels(path) for layer, path in known.items()}
    if any(said.values()):
        inputs["labels"] = {traced[layer].site.name: labels_digest(own) for layer, own in said.items() if own}
    pages = {} if dashboard is None else _feature_pages(dashboard, traced, inputs["tables"], output)
    request = {
        "question": question.record(),
        "settings": settings.model_dump(mode="json"),
        "inputs": inputs,
    }
    if pages:
        request["pages"] = {traced[layer].site.name: address for layer, address in pages.items()}

    def make(path: Path) -> Made:
        asked = _answer(settings, question, keep, given, model, compute)
        record = {"model": asked.model.identity(), "root": asked.document["root"]}
        return Made(record, _write(asked, known, pages, path), MODEL_LIBRARIES)

    with compute.opened():
        publish_stage(output, KIND, request, make)
    return read_result(output)


def _feature_pages(
    dashboard: Path, traced: Mapping[int, TranscoderLayer], tables: Mapping[str, Any], output: Path
) -> dict[int, str]:
    """Return by layer where a dashboard shows its features, as seen from ``output``."""
    manifest = DashboardManifest.read(dashboard)
    base = quote(os.path.relpath(dashboard.absolute(), output.absolute()))
    sites = {layer: one.site.name for layer, one in traced.items()}
    pages = {layer: f"{base}/{address}" for layer, site in sites.items() if (address := manifest.address(site))}
    if not pages:
        raise SettingsError(
            f"--dashboard {dashboard}: shows none of {', '.join(sites.values())}; give the one of these transcoders"
        )
    shown = json.dumps(manifest.request["inputs"]["tables"])
    if others := [site for layer in pages if (site := sites[layer]) in tables and tables[site]["digest"] not in shown]:
        raise ArtifactMismatch(
            f"--dashboard {dashboard}: was made of other tables of {', '.join(others)} than given; make it of these"
        )
    return pages


def read_result(path: Path) -> CircuitResult:
    """Return a published circuit. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = CircuitManifest.read(path)
    document = documents.CircuitDocument.read_file(published_file(path, manifest, CIRCUIT))
    return CircuitResult(path, document.as_json())


def _answer(
    settings: CircuitSettings,
    question: Question,
    keep: NodeFilter,
    transcoders: Sequence[PublishedTranscoder],
    model: str | None,
    compute: Compute,
) -> _Asked:
    dtype = None if settings.dtype == "recorded" else settings.dtype
    opened = open_transcoder_model(
        [one.path for one in transcoders], model=model, device=compute.device_name, dtype=dtype
    )
    asked = _Asked(opened, question, settings, keep, quiet=compute.quiet)
    coders = {site: layer for one in transcoders for site, layer in one.load().items()}
    asked.run_on(coders, LearntTokens(layers_of(transcoders), opened)(torch.tensor([asked.ids]))[0])
    return asked


class _Asked:
    """A question on its way to an answer."""

    def __init__(
        self,
        model: LanguageModel,
        question: Question,
        settings: CircuitSettings,
        keep: NodeFilter,
        *,
        quiet: bool,
    ) -> None:
        self.model, self.question, self.settings, self.keep = model, question, settings, keep
        self._quiet = quiet
        self.ids = prompt_tokens(model, question.prompt)
        vocabulary = model.vocabulary()
        texts = join_characters([vocabulary[one] for one in self.ids])
        self.tokens = list(zip(self.ids, texts, strict=True))
        self._vocabulary = vocabulary
        asked = question.logit_difference or ((question.logit,) if question.logit is not None else ())
        self._logits = token_ids(model, asked, "logit")

    def run_on(self, transcoders: dict[Any, Any], transcoded: Tensor) -> None:
        """Run the model and find everything out; transcoders stand in at the tokens ``transcoded`` (T,)."""
        with explained_passes(1):
            run = record_run(
                self.model.bridge,
                read_weights(self.model),
                transcoders,
                torch.tensor(self.ids),
                transcoded=transcoded,
                allow_opaque=self.settings.missing_layers == "opaque",
            )
        root = self._root(run)
        likely = top_logits(run, self.question.token, mass=1.0, at_most=N_LIKELY)
        started = time.perf_counter()
        terms = contributions(run, root.probe)
        seconds = time.perf_counter() - started
        self.graph, self.pruned, self.names = self._attribution_graph(run, root, seconds)
        rounds = search_paths(run, root, self._search())
        self.document = {
            "format": FORMAT_VERSION,
            "prompt": self.question.prompt,
            "tokens": [{"id": one, "text": text} for one, text in self.tokens],
            "likely": [{"id": one, "text": self._vocabulary[one], "probability": p} for one, p in likely],
            "root": {
                **documents.describe_root(root, terms),
                "text": self._name(root),
                "logits": [self._vocabulary[one] for one in self._logits],
            },
            "rounds": documents.describe_rounds(rounds),
            "path_graph": self._path_graph(run, rounds),
            "attribution_graph": (
                None
                if self.graph is None or self.pruned is None
                else documents.describe_attribution_graph(self.graph, self.pruned, self.names)
            ),
        }
        self.document["features"] = documents.describe_features(run, features_shown(self.document))

    def _root(self, run: LinearisedRun) -> Root:
        question = self.question
        if question.feature is not None:
            make = feature_root if question.direction == "encoder" else decoder_root
            return make(run, *question.feature, question.token)
        return logit_root(run, self._logits[0], question.token, minus=self._logits[1] if self._logits[1:] else None)

    def _search(self) -> SearchSettings:
        one = self.settings
        return SearchSettings(
            one.iterations, one.branches, one.order, one.cap, one.ignore_bos, one.extend_layer_0, self.keep
        )

    def _path_graph(self, run: LinearisedRun, rounds: Sequence[Sequence[CircuitPath]]) -> dict[str, Any] | None:
        """Return the graph of all paths; capped values make none."""
        if self.settings.cap or not rounds:
            return None
        graph = graph_of_paths(path for paths in rounds for path in paths)
        return documents.describe_path_graph(completed(run, graph))

    def _attribution_graph(
        self, run: LinearisedRun, root: Root, root_seconds: float
    ) -> tuple[AttributionGraph | None, Pruned | None, list[str]]:
        """Return the graph with the root as its target; for a logit, with the other likely tokens as well.

        Says what the circuit costs once the first features were timed; a path takes as long as the root did.
        """
        one = self.settings
        path_seconds = root_seconds * (1 + one.branches * (one.iterations - 1))
        if one.max_features == 0:
            self._say_cost(run, path_seconds, 0)
            return None, None, []
        settings = GraphSettings(
            max_features=one.max_features, node_threshold=one.node_threshold, edge_threshold=one.edge_threshold
        )
        targets, weights, names = self._targets(run, root)
        with Progress(None, "circuit", "features", quiet=self._quiet) as bar:
            started: list[float] = []

            def progress(n: int, of: int) -> None:
                bar.total = of
                bar.update(n - bar.done)
                started.append(time.perf_counter())
                if len(started) == 2 or of == 0:
                    graph_seconds = (started[-1] - started[0]) * of / max(1, n)
                    self._say_cost(run, path_seconds + graph_seconds, of)

            graph = build_graph(run, targets, weights, settings, progress=progress)
        return graph, graph.pruned(settings), names

    def _targets(self, run: LinearisedRun, root: Root) -> tuple[list[Root], list[float], list[str]]:
        """Return the targets of the graph, their weights and what they are called."""
        if self.question.logit is None:
            return [root], [1.0], [self._name(root)]
        chosen = dict(top_logits(run, self.question.token))
        likely = [self._logits[0], *(one for one in chosen if one != self._logits[0])]
        smallest = min(chosen.values())  # the token asked for counts even where it is unlikely
        names = [
            f'Output "{self._vocabulary[one]}" (p={chosen[one]:.3f})' if one in chosen else self._vocabulary[one]
            for one in likely
        ]
        weights = [chosen.get(one, smallest) for one in likely]
        return centred_logit_roots(run, likely, self.question.token), weights, names

    def _say_cost(self, run: LinearisedRun, seconds: float, n_rows: int) -> None:
        if self._quiet:
            return
        n_active = sum(layer.n_active for layer in run.transcoders.values())
        modules = [self.model.bridge.original_model, *(layer.transcoder for layer in run.transcoders.values())]
        weights = {id(one): one for module in modules for one in module.parameters()}.values()
        n_bytes = sum(one.numel() * one.element_size() for one in weights)
        n_bytes += n_rows * (n_active + run.n_layers * run.n_tokens) * run.embedding.element_size()
        graph = f", {n_rows:,} of them in a graph" if n_rows else ""
        say_once(
            f"cost: {run.n_tokens:,} tokens, {n_active:,} active features{graph}; about {duration(seconds)} by the "
            f"first, just timed; at least {size(n_bytes)} of memory; a few MB on disk"
        )

    def _name(self, root: Root) -> str:
        texts = [repr(self._vocabulary[one]) for one in self._logits]
        return f"{root.node} ({' − '.join(texts)})" if texts else str(root.node)


def _write(asked: _Asked, tables: Mapping[int, Path], pages: Mapping[int, str], output: Path) -> list[str]:
    """Write the files of a circuit; return their names."""
    write_atomically(output / CIRCUIT, _json(asked.document))
    cards = read_cards(tables, features_shown(asked.document))
    write_atomically(output / PAGE, render_page(asked.document, cards, pages).encode())
    files = [CIRCUIT, PAGE]
    if asked.graph is not None and asked.pruned is not None:
        identity = asked.model.identity()
        document = viewer_document(
            asked.graph,
            asked.pruned,
            slug=output.name,
            scan=str(identity["name"]),
            prompt=asked.question.prompt,
            tokens=[(one, text or PART) for one, text in asked.tokens],
            names=asked.names,
            n_layers=asked.model.n_layers,
            node_threshold=asked.settings.node_threshold,
            labels={
                (layer, feature): one.label
                for layer, path in tables.items()
                for feature, one in read_labels(path).items()
            },
        )
        write_atomically(output / VIEWER, _json(document))
        files.append(VIEWER)
    return files


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
