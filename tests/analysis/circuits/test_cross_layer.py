"""Circuits through a cross-layer transcoder: features that write to several MLP outputs, and sums that stay exact."""

from __future__ import annotations

import functools
import weakref
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from tailrace.analysis.circuits.attribution import attribute, list_sources
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.paths import SearchSettings, extensions, root_step
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import Root, centred_logit_roots, decoder_root, feature_root, logit_root
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.analysis.splice.hook_points import observed
from tailrace.analysis.splice.passes import PassTokens
from tailrace.analysis.splice.replacement import decode_in_pass
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError
from tailrace.training.cross_layer.layers import split_layers
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tests.support.circuit_runs import (
    D_SAE,
    TOKENS,
    WIDTH,
    exact_norms,
    frozen_pass,
    mixed_transcoders,
    mlp_site,
    recorded_pass,
    tiny_model,
)

EXACT = 1e-9
"""Of Σ|terms|, in float64."""
FAMILIES = ["gpt2", "neox", "llama", "gemma2"]


@functools.cache
def transcoder(n_layers: int = 3) -> CrossLayerTranscoder:
    made = CrossLayerTranscoder(n_layers, WIDTH, WIDTH, D_SAE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name == "log_threshold":
                parameter.sub_(1.5)
        made.constrain_parameters()
    return made.double().eval().requires_grad_(False)


def stream_site(layer: int) -> Site:
    """The MLP of a layer, read before its norm, as the cross-layer transcoders of some others do."""
    return replace(mlp_site(layer), hook_in=f"blocks.{layer}.hook_resid_mid")


@functools.cache
def run_of(family: str, n_layers: int = 3, *, reads_stream: bool = False) -> LinearisedRun:
    model, weights = tiny_model(family, double=True)
    site = stream_site if reads_stream else mlp_site
    sites = [site(layer) for layer in range(n_layers)]
    layers = dict(zip(sites, split_layers(transcoder(n_layers), sites), strict=True))
    with exact_norms(model.bridge, weights):
        return record_run(model.bridge, weights, layers, TOKENS, allow_opaque=n_layers < 3)


def some_roots(run: LinearisedRun) -> list[Root]:
    roots = [logit_root(run, 5), logit_root(run, 7, -2, minus=9), *centred_logit_roots(run, [3, 4])]
    for layer, active in run.transcoders.items():
        last = int(active.feature[active.at(5)][0])
        roots += [feature_root(run, layer, last), decoder_root(run, layer, last)]
    return roots


def test_what_is_split_by_layers_is_the_transcoder() -> None:
    whole = transcoder()
    parts = split_layers(whole, [mlp_site(layer) for layer in (4, 5, 9)])
    inputs = torch.randn(7, 3 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activations = [part.encode(inputs[:, place * WIDTH : (place + 1) * WIDTH]) for place, part in enumerate(parts)]
    assert torch.equal(torch.cat(activations, 1), whole.encode(inputs))
    outputs = whole(inputs)
    for place, target in enumerate((4, 5, 9)):
        decoders = [part.writes(target) for part in parts[: place + 1]]
        written = torch.zeros(7, WIDTH, dtype=torch.float64)
        for acts, decoder in zip(activations, decoders, strict=False):
            assert decoder is not None
            written += acts @ decoder
        made = written + parts[place].b_dec_out
        torch.testing.assert_close(made, outputs[:, place * WIDTH : (place + 1) * WIDTH])
    assert parts[1].writes(4) is None  # nothing is written to layers before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_is_what_all_layers_up_to_it_leave_of_an_output(family: str) -> None:
    run, whole = run_of(family), transcoder()
    inputs = torch.cat([layer.mlp_in for layer in run.layers], 1)
    made = whole(inputs)
    for number, layer in enumerate(run.layers):
        assert layer.features is not None
        missed = layer.mlp_out - made[:, number * WIDTH : (number + 1) * WIDTH]
        torch.testing.assert_close(layer.features.error[1:], missed[1:])
        assert float(layer.features.error[0].abs().max()) == 0.0  # the BOS is the model's own


READERS = [*((family, False) for family in FAMILIES), ("gpt2", True), ("llama", True), ("gemma2", True)]


@pytest.mark.parametrize(("family", "reads_stream"), READERS)
def test_terms_of_every_root_sum_to_its_recorded_value(family: str, reads_stream: bool) -> None:
    run = run_of(family, reads_stream=reads_stream)
    roots = some_roots(run)
    rows = attribute(run, [root.probe for root in roots])
    for row, root in zip(rows, roots, strict=True):
        terms = contributions(run, root.probe)
        assert terms.incompleteness(root.value) < EXACT, str(root.node)
        assert max(Counter(terms.nodes.nodes(range(terms.nodes.n_nodes))).values()) == 1, "a node is one term"
        assert abs(float(row.sum()) - root.value) < EXACT * float(row.abs().sum()), str(root.node)


def test_a_feature_that_does_not_fire_is_looked_up_where_the_transcoder_lies() -> None:
    run = run_of("gpt2")
    silent = min(set(range(D_SAE)) - set(run.transcoders[2].feature[run.transcoders[2].at(4)].tolist()))
    root = feature_root(run, 2, silent, 4)
    assert not root.is_active
    with torch.device("meta"):  # where a tensor goes of which nothing else is said
        assert feature_root(run, 2, silent, 4).value == root.value


def test_a_step_further_back_every_node_is_explained_by_terms_that_sum_to_its_own_contribution() -> None:
    run = run_of("gpt2")
    everything = SearchSettings(branches=10_000, order="magnitude", ignore_bos=False, extend_layer_0=True)
    n_explained = 0
    for root in (logit_root(run, 5), decoder_root(run, 2, int(run.transcoders[2].feature[-1]))):
        for path in extensions(run, (root_step(root),), everything):
            step = path[-1]
            if step.probe is not None:
                n_explained += step.node.kind is Kind.FEATURE
                terms = contributions(run, step.probe)
                assert abs(terms.total - step.value) < EXACT * terms.magnitude, str(step.node)
    assert n_explained > 10


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_direct_effects_equal_the_sum_over_all_chains_of_heads(family: str) -> None:
    run = run_of(family)
    root = logit_root(run, 5, 2)
    chains: dict[Node, float] = defaultdict(float)
    everything = SearchSettings(branches=10_000, order="magnitude", ignore_bos=False, extend_layer_0=True)
    pending = [(root_step(root),)]
    while pending:
        for path in extensions(run, pending.pop(), everything):
            if path[-1].node.kind is Kind.HEAD:
                pending.append(path)  # type: ignore[arg-type]
            else:
                chains[path[-1].node] += path[-1].value
    sources = list_sources(run)
    row = attribute(run, [root.probe], sources)[0]
    places = np.flatnonzero(sources.nodes.are(Kind.FEATURE, Kind.EMBEDDING))
    shown = {sources.nodes.node(int(place)): float(row[place]) for place in places if row[place] != 0}
    expected = {
        node: value for node, value in chains.items() if node.kind in (Kind.FEATURE, Kind.EMBEDDING) and value != 0
    }
    assert shown == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edge_times_delta_is_what_changing_a_feature_at_all_its_outputs_does(family: str) -> None:
    run = run_of(family)
    model, weights = tiny_model(family, double=True)
    bridge, delta = model.bridge, 0.37
    recorded = recorded_pass(bridge, weights)
    sources = list_sources(run)
    rows = attribute(run, [logit_root(run, 11, 5).probe], sources)
    for layer, token in ((0, 2), (0, 5), (1, 2), (2, 5)):
        active = run.transcoders[layer]
        place = active.at(token).start
        changed = dict(recorded)
        for target in range(layer, 3):
            decoder = active.writes(layer, target)
            assert decoder is not None
            written = recorded[f"blocks.{target}.mlp.hook_out"].clone()
            written[0, token] += delta * decoder[active.feature[place]]
            changed[f"blocks.{target}.mlp.hook_out"] = written
        with (
            torch.inference_mode(),
            frozen_pass(bridge, weights, changed),
            observed(bridge.hook_dict, ["ln_final.hook_out"]) as seen,
        ):
            bridge(TOKENS[None], return_type=None, use_cache=False)
        moved = float((seen["ln_final.hook_out"] - recorded["ln_final.hook_out"])[0, 5] @ weights.W_U[:, 11].double())
        edge = float(rows[0, sources.features[layer].start + place] / active.activation[place])
        assert moved == pytest.approx(edge * delta, rel=1e-8, abs=1e-14), (layer, token)
        assert abs(edge) > 1e-6


def test_what_reads_the_stream_itself_passes_no_norm() -> None:
    """D-42: a transcoder of the stream was given normalised inputs."""
    model, weights = tiny_model("llama", double=True)
    names = [f"blocks.{layer}.hook_resid_mid" for layer in range(3)]
    run = run_of("llama", reads_stream=True)
    with torch.inference_mode(), exact_norms(model.bridge, weights), observed(model.bridge.hook_dict, names) as seen:
        model.bridge(TOKENS[None], return_type=None, use_cache=False)
    whole = transcoder()
    activations = whole.encode(torch.cat([seen[name][0] for name in names], 1))
    for layer, active in run.transcoders.items():
        own = activations[:, whole.of_layer(layer)]
        token, feature = torch.nonzero(own[1:], as_tuple=True)
        assert torch.equal(active.token, token + 1)
        assert torch.equal(active.feature, feature)
        torch.testing.assert_close(active.activation, own[token + 1, feature])
    root = feature_root(run, 2, int(run.transcoders[2].feature[run.transcoders[2].at(5)][0]), 5)
    encoder = run.transcoders[2].transcoder.W_enc[root.node.index or 0]
    torch.testing.assert_close(root.probe.vector, encoder)


def test_skip_transcoders_may_read_the_stream_too() -> None:
    model, weights = tiny_model("llama", double=True)
    layers = {stream_site(layer): one for layer, one in enumerate(mixed_transcoders().values())}
    with exact_norms(model.bridge, weights):
        run = record_run(model.bridge, weights, layers, TOKENS)
    roots = some_roots(run)
    rows = attribute(run, [root.probe for root in roots])
    for row, root in zip(rows, roots, strict=True):
        assert contributions(run, root.probe).incompleteness(root.value) < EXACT, str(root.node)
        assert abs(float(row.sum()) - root.value) < EXACT * float(row.abs().sum()), str(root.node)


def test_layers_above_without_a_transcoder_are_nodes_of_their_own() -> None:
    run = run_of("gpt2", 2)
    root = logit_root(run, 5)
    terms = contributions(run, root.probe)
    assert terms.incompleteness(root.value) < EXACT
    opaque = {node.layer for node in terms.nodes.nodes(np.flatnonzero(terms.nodes.are(Kind.MLP)))}
    assert opaque == {2}


def test_parts_in_place_add_up_layer_by_layer_and_refuse_to_be_out_of_order() -> None:
    whole = transcoder()
    inputs = torch.randn(7, 3 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = split_layers(whole, [mlp_site(layer) for layer in range(3)])
    made = []
    tokens = PassTokens(1, 0, 7, None, torch.device("cpu"))
    for index, part in enumerate(parts):
        own = inputs[:, index * WIDTH : (index + 1) * WIDTH]
        activations = part.encode(own)
        made.append(decode_in_pass(part, activations, own, tokens))
    held = weakref.ref(activations)
    del activations
    assert held() is None, "a pass that is over holds nothing"
    torch.testing.assert_close(torch.cat(made, 1), whole(inputs))
    own = inputs[:, :WIDTH]
    decode_in_pass(parts[0], parts[0].encode(own), own, tokens)
    with pytest.raises(ModelError, match="layer2 of a cross-layer transcoder was asked for before layer1 were read"):
        decode_in_pass(parts[2], parts[2].encode(own), own, tokens)
