"""The runs that are asked for: which features are changed in each, and which random ones beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailrace.analysis.interventions.generation import FeatureChange
from tailrace.pipeline.artifacts.manifests import CircuitManifest
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.circuit.stage import read_result
from tailrace.pipeline.shared.feature_selection import parse_layer_features
from tailrace.pipeline.steer.settings import Assignment, Change, SteerSettings
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.shuffle import philox
from tailrace.storage.tables import read_table

Layers = Mapping[str, TranscoderLayer]
"""Layers of transcoders by the names of their sites."""

_POOL = 4
"""A random feature is drawn from this many times as many as are drawn, the nearest in frequency."""
_SMALLEST_POOL = 50


@dataclass(frozen=True)
class SteeredRun:
    """Changes that are made together."""

    label: str
    changes: tuple[FeatureChange, ...]


@dataclass(frozen=True)
class CircuitNodes:
    """The features of a published circuit."""

    path: Path
    prompt: str
    by_name: Mapping[str, tuple[int, int, int]]
    """Layer, feature and token of each, the most influential in the attribution graph first."""
    n_ranked: int
    """How many of them have an influence."""
    digests: Mapping[str, str]
    """Of the transcoders it was traced through, by site."""


def read_circuit(path: Path) -> CircuitNodes:
    """Return the features in a circuit's graphs and paths. Raises ArtifactError."""
    manifest = CircuitManifest.read(path)
    document = read_result(path).document
    graph = (document["attribution_graph"] or {"nodes": []})["nodes"]
    ranked = [node for node in graph if node.get("influence") is not None and node["kind"] == "feature"]
    ranked.sort(key=lambda node: -node["influence"])
    others = [*graph, *(document["path_graph"] or {"nodes": []})["nodes"], document["root"]["node"]]
    others += [step["node"] for paths in document["rounds"] for one in paths for step in one["steps"]]
    found = {
        node["name"]: (node["layer"], node["index"], node["token"])
        for node in [*ranked, *others]
        if node["kind"] == "feature"
    }
    digests = {site: one.digest for site, one in (manifest.inputs.transcoders or {}).items()}
    return CircuitNodes(path, document["prompt"], found, len(ranked), digests)


def asked_runs(
    settings: SteerSettings, layers: Layers, circuit: CircuitNodes | None, *, of_its_prompt: bool
) -> list[SteeredRun]:
    """Return the runs that settings ask for.

    Nodes of a circuit are changed at their tokens where its own prompt is run, and elsewhere at all tokens. Raises
    SettingsError, with every problem, for features and nodes that are not there; ArtifactMismatch for a circuit that
    was traced through other transcoders.
    """
    assignments = settings.assignments
    of_features, of_nodes = assignments[: len(settings.feature)], assignments[len(settings.feature) :]
    problems = []
    if not assignments:
        problems.append(
            "nothing is to be changed; give --feature LAYER:INDEX=+30, or --from-circuit and --nodes 10=off"
        )
    if (circuit is None) != (not of_nodes):
        problems.append(
            f"--nodes {of_nodes[0].features}: are of a circuit; give it by --from-circuit"
            if circuit is None
            else f"--from-circuit {circuit.path}: say which of its nodes, and what to do, such as --nodes 10=off"
        )
    targets: list[tuple[Assignment, list[FeatureChange]]] = []
    for one in of_features:
        try:
            chosen = parse_layer_features([one.features], {name: layer.d_sae for name, layer in layers.items()})
        except SettingsError as error:
            problems.append(str(error))
            continue
        names = list(layers)
        targets.append((one, [FeatureChange(layers[names[at]].site, (index,), "off") for at, index in chosen]))
    if circuit is not None:
        _check_same(circuit, layers)
        sites = {layer.site.layer: layer.site for layer in layers.values()}
        for one in of_nodes:
            names, unknown = _named(one.features, circuit)
            problems += unknown
            places = [circuit.by_name[name] for name in names]
            missing = sorted({layer for layer, _, _ in places if layer not in sites})
            problems += [f"--nodes {one.features}: no transcoder of layer {layer} was given" for layer in missing]
            changes = [
                FeatureChange(sites[layer], (index,), "off", position=token if of_its_prompt else None)
                for layer, index, token in places
                if layer in sites
            ]
            targets.append((one, list(dict.fromkeys(changes))))
    if problems:
        raise SettingsError("\n".join(problems))
    return [_run(targets, number) for number in range(settings.n_runs)]


def _run(targets: Sequence[tuple[Assignment, list[FeatureChange]]], number: int) -> SteeredRun:
    labels, changes = [], []
    for one, wanted in targets:
        change: Change = one.changes[number] if len(one.changes) > 1 else one.changes[0]
        what = f"{one.features} nodes" if one.features.isdigit() and len(wanted) > 1 else one.features
        labels.append(f"{what}={change.text}")
        changes += [replace(own, kind=change.kind, value=change.value) for own in wanted]
    return SteeredRun(", ".join(labels), tuple(changes))


def _check_same(circuit: CircuitNodes, layers: Layers) -> None:
    differing = [site for site, digest in circuit.digests.items() if site in layers and layers[site].digest != digest]
    if differing:
        raise ArtifactMismatch(
            f"{circuit.path}: was traced through other transcoders of {', '.join(differing)} than those given; give "
            "the ones it was made with"
        )


def _named(text: str, circuit: CircuitNodes) -> tuple[list[str], list[str]]:
    """Return the names of the nodes meant, and a problem for each that is not there."""
    if re.fullmatch(r"\d{1,9}", text):
        if 0 < int(text) <= circuit.n_ranked:
            return list(circuit.by_name)[: int(text)], []
        return [], [
            f"--nodes {text}: the attribution graph of {circuit.path} has {circuit.n_ranked} features; give 1 to that "
            "many, or names"
        ]
    names = [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in circuit.by_name]
    shown = ", ".join(list(circuit.by_name)[:5]) or "none"
    problems = [f"--nodes {name}: is no feature of {circuit.path}; it has {shown}, …" for name in unknown]
    return [name for name in names if name in circuit.by_name], problems


@dataclass(frozen=True, eq=False)
class FeatureFacts:
    """What is known of the features of a layer."""

    n_active: NDArray[np.int64]
    """(d_sae,) rows of the tables on which each is active."""
    norms: NDArray[np.float64]
    """(d_sae,) of what each writes, over all layers that it writes to."""

    @classmethod
    def of(cls, layer: TranscoderLayer, tables: Path) -> FeatureFacts:
        """Read them from tables and weights."""
        rows = read_table(tables / "features.parquet", ["feature", "n_active"]).sort_by("feature")
        norms = layer.load_writes().double().flatten(1).norm(dim=1)
        return cls(rows["n_active"].to_numpy(), norms.numpy())


def random_runs(run: SteeredRun, facts: Mapping[str, FeatureFacts], n_draws: int, seed: int) -> Iterator[SteeredRun]:
    """Yield ``n_draws`` runs with every feature of ``run`` exchanged for a random one that is as often active.

    Each is drawn, without repetition, from the living features nearest in frequency. What is added or clamped is scaled
    so that strength times decoder norm stays. The draws of a seed are the same features whatever is done to them.
    Raises SettingsError if a layer has too few living features.
    """
    own = list(dict.fromkeys((change.site.name, index) for change in run.changes for index in change.features))
    drawn = {
        site: _draw(facts[site], site, [one for name, one in own if name == site], n_draws, seed) for site, _ in own
    }
    for draw in range(n_draws):
        changes = []
        for change in run.changes:
            site = change.site.name
            (index,) = change.features
            other = drawn[site][index][draw]
            ratio = facts[site].norms[index] / facts[site].norms[other] if change.kind in ("add", "clamp") else 1.0
            changes.append(replace(change, features=(other,), value=change.value * ratio))
        label = ", ".join(dict.fromkeys(f"{change.site.name}:{change.features[0]}" for change in changes))
        yield SteeredRun(label, tuple(changes))


def _draw(facts: FeatureFacts, site: str, own: Sequence[int], n_draws: int, seed: int) -> dict[int, list[int]]:
    """Return for each of a layer's changed features the random one of every draw, no two of a draw the same."""
    is_living = (facts.n_active > 0) & (facts.norms > 0)
    is_living[list(own)] = False
    living = np.flatnonzero(is_living)
    n_needed = n_draws + len(own) - 1
    if len(living) < n_needed:
        raise SettingsError(
            f"--random {n_draws}: site {site} has {len(living)} other living features by its tables; ask for fewer"
        )
    # half a row more: a feature that the tables saw nowhere is nearest to the rarest
    log_active = np.log(facts.n_active + 0.5)
    taken: list[set[int]] = [set() for _ in range(n_draws)]
    drawn: dict[int, list[int]] = {}
    for index in own:
        nearest = np.argsort(np.abs(log_active[living] - log_active[index]), kind="stable")
        pool = living[nearest[: max(_SMALLEST_POOL, _POOL * n_draws, n_needed)]]
        order = np.random.Generator(philox(seed, f"steer/random/{site}", index)).permutation(pool).tolist()
        drawn[index] = []
        for others in taken:
            other = next(one for one in order if one not in others and one not in drawn[index])
            others.add(other)
            drawn[index].append(other)
    return drawn
