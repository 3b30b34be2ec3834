"""Graphs of paths add up, node by node; attribution graphs too, and pruning keeps what matters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tailrace.analysis.circuits.attribution import attribute, list_sources
from tailrace.analysis.circuits.attribution_graph import AttributionGraph, GraphSettings, build_graph, top_logits
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.influence import influences, prune, shares
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.path_graph import (
    GraphNode,
    PathGraph,
    completed,
    graph_of_paths,
    summed_over_tokens,
)
from tailrace.analysis.circuits.paths import Path, SearchSettings, search_paths
from tailrace.analysis.circuits.readers import feature_probe
from tailrace.analysis.circuits.roots import centred_logit_roots, feature_root, logit_root
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.pipeline.circuit.page import height_of, place_nodes, squeezed, strength
from tests.support.circuit_runs import ROOT, A, B, H, first_active, path, tiny_model, tiny_run


def golden() -> PathGraph:
    """The worked example of the specification: four paths of one root."""
    return graph_of_paths(
        [
            path((ROOT, 3.0), (A, 2.0)),
            path((ROOT, 3.0), (B, 0.5)),
            path((ROOT, 3.0), (H, 0.25)),
            path((ROOT, 3.0), (A, 2.0), (B, 0.125)),
        ]
    )


def searched(run: LinearisedRun, branches: int = 8) -> list[Path]:
    root = feature_root(run, 2, first_active(run, 2))
    rounds = search_paths(run, root, SearchSettings(3, branches, order="magnitude"))
    return [one for paths in rounds for one in paths]


# ---- graphs of paths


def test_edges_and_nodes_sum_over_distinct_beginnings_of_paths() -> None:
    graph = golden()
    assert graph.root == ROOT
    assert graph.edges == {(A, ROOT): 2.0, (B, ROOT): 0.5, (H, ROOT): 0.25, (B, A): 0.125}
    assert {node: known.value for node, known in graph.nodes.items()} == {ROOT: 3.0, A: 2.0, B: 0.625, H: 0.25}
    probe = graph.nodes[B].probe
    assert probe is not None
    assert torch.equal(probe.vector, 2 * torch.ones(2))


def test_paths_of_several_roots_or_none_make_no_graph() -> None:
    with pytest.raises(ValueError, match="2 roots"):
        graph_of_paths([path((ROOT, 3.0)), path((A, 3.0))])
    with pytest.raises(ValueError, match="0 roots"):
        graph_of_paths([])


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "gemma2"])
def test_what_comes_into_every_node_is_what_the_node_has(family: str) -> None:
    """D-58: what was pruned was counted beside errors and biases that are part of it."""
    run = tiny_run(family)
    graph = completed(run, graph_of_paths(searched(run)))
    assert len(graph.parents) > 3
    for parent in graph.parents:
        assert sum(graph.incoming(parent).values()) == pytest.approx(graph.nodes[parent].value, rel=1e-9)


def test_what_was_pruned_is_the_sum_of_the_terms_that_no_edge_shows() -> None:
    run = tiny_run("gpt2")
    plain = graph_of_paths(searched(run))
    graph = completed(run, plain)
    root = graph.root
    probe = plain.nodes[root].probe
    assert probe is not None
    terms = contributions(run, probe)
    shown = {node for node, _ in ((child, to) for child, to in plain.edges if to == root)}
    kinds = (Kind.FEATURE, Kind.HEAD, Kind.SKIP, Kind.EMBEDDING, Kind.POSITION)
    left_out = sum(
        float(value)
        for place, value in enumerate(terms.values)
        if (node := terms.nodes.node(place)).kind in kinds and node not in shown
    )
    pruned = graph.nodes[Node(Kind.PRUNED, token=root.token, of=root)].value
    assert pruned == pytest.approx(left_out, rel=1e-9)
    errors = graph.nodes[Node(Kind.ERROR, token=root.token, of=root)].value
    assert errors == pytest.approx(terms.sum_of(Kind.ERROR))


def test_the_bias_of_a_node_is_scaled_by_how_strongly_it_reaches_the_root() -> None:
    """D-59: an intermediate feature's whole bias stood beside its share of the root."""
    run = tiny_run("gpt2")
    plain = graph_of_paths(searched(run))
    graph = completed(run, plain)
    inner = [node for node in plain.parents if node.kind is Kind.FEATURE and node != plain.root]
    assert inner
    for node in inner:
        own = feature_probe(run, node.layer or 0, node.token or 0, node.index or 0)
        gain = plain.nodes[node].value / run.value(own)
        beside = graph.nodes[Node(Kind.BIAS, token=node.token, of=node)].value
        assert beside == pytest.approx(own.constant * gain, rel=1e-9)
        assert abs(gain - 1) > 0.05  # unscaled would be told apart


def test_biases_of_attention_and_of_decoders_are_nodes() -> None:
    """D-60."""
    run = tiny_run("gpt2")
    plain = graph_of_paths(searched(run))
    root = plain.root
    probe = plain.nodes[root].probe
    assert probe is not None
    graph = completed(run, plain)
    biases = [layer.weights.attention.b_O for layer in run.layers]
    b_O = sum(float(bias @ probe.vector) for bias in biases if bias is not None)
    b_dec = sum(float(run.transcoders[layer].transcoder.b_dec_out @ probe.vector) for layer in (0, 1))
    shown = {kind: graph.nodes[Node(kind, token=root.token, of=root)].value for kind in Kind if _beside(graph, kind)}
    assert shown[Kind.ATTENTION_BIAS] == pytest.approx(b_O)
    assert shown[Kind.DECODER_BIAS] == pytest.approx(b_dec)


def _beside(graph: PathGraph, kind: Kind) -> bool:
    return Node(kind, token=graph.root.token, of=graph.root) in graph.nodes


def test_what_lies_beside_a_node_stays_its_own_when_tokens_are_summed() -> None:
    """D-61: error nodes of all features of a layer became one."""
    other = dataclasses.replace(A, index=5)
    errors = {node: Node(Kind.ERROR, token=5, of=node) for node in (A, other)}
    edges = {(A, ROOT): 2.0, (other, ROOT): 1.0, (errors[A], A): 0.3, (errors[other], other): 0.4}
    elsewhere = dataclasses.replace(A, token=3)
    edges |= {(elsewhere, ROOT): 0.5, (Node(Kind.ERROR, token=3, of=elsewhere), elsewhere): 0.2}
    values = {ROOT: 4.0, A: 2.0, other: 1.0, elsewhere: 0.5, errors[A]: 0.3, errors[other]: 0.4}
    values[Node(Kind.ERROR, token=3, of=elsewhere)] = 0.2
    summed = summed_over_tokens(PathGraph(ROOT, {node: GraphNode(value) for node, value in values.items()}, edges))
    found = {str(node): known.value for node, known in summed.nodes.items()}
    assert found == {
        "mlp2tc[7]": 4.0, "mlp1tc[4]": 2.5, "mlp1tc[5]": 1.0, "mlp1tc[4].tc_error": 0.5, "mlp1tc[5].tc_error": 0.4,
    }  # fmt: skip
    assert {(str(child), str(parent)): value for (child, parent), value in summed.edges.items()} == {
        ("mlp1tc[4]", "mlp2tc[7]"): 2.5, ("mlp1tc[5]", "mlp2tc[7]"): 1.0,
        ("mlp1tc[4].tc_error", "mlp1tc[4]"): 0.5, ("mlp1tc[5].tc_error", "mlp1tc[5]"): 0.4,
    }  # fmt: skip


def test_roots_without_an_activation_have_a_value_and_complete_graphs() -> None:
    """D-80: logit directions had none, and adding errors failed."""
    run = tiny_run("gpt2")
    root = logit_root(run, 5, minus=6)
    rounds = search_paths(run, root, SearchSettings(2, 5, order="magnitude"))
    graph = completed(run, graph_of_paths(one for paths in rounds for one in paths))
    assert graph.nodes[graph.root].value == root.value == pytest.approx(run.value(root.probe))
    assert sum(graph.incoming(graph.root).values()) == pytest.approx(root.value)


# ---- placing nodes


def test_heights_follow_the_layers() -> None:
    beside = Node(Kind.ERROR, token=5, of=ROOT)
    heights = [height_of(node) for node in (ROOT, A, B, H, Node(Kind.EMBEDDING, 0, 5), beside)]
    assert heights == [2.5, 1.5, 0.5, 1.0, 0.0, 2.25]


def test_placing_is_repeatable_and_keeps_nodes_of_one_cell_apart() -> None:
    """D-62: places were random."""
    other = dataclasses.replace(A, index=9)
    layout = place_nodes([A, other, ROOT, H])
    assert layout == place_nodes([A, other, ROOT, H])
    # Token 3 has one node in its fullest layer, token 5 two; a single node stands in the middle of its column.
    assert [tuple(column) for column in layout.columns] == [(3, 0.0, 1.0), (5, 1.0, 2.0)]
    assert layout.places == {H: (0.5, 1.0), A: (1.5, 1.5), other: (2.5, 1.5), ROOT: (2.0, 2.5)}
    assert place_nodes([]).places == {}


def test_equal_values_and_zeros_have_a_strength_and_inhibition_is_told_apart() -> None:
    """D-62: equal contributions divided by zero, and negative ones looked like small ones."""
    assert strength(0.0, 0.0) == 0.0
    assert strength(1.0, 1.0) == 1.0
    assert strength(-2.0, 4.0) == -0.5


# ---- influence


def random_graph(n: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1)  # targets first: row reads from later


def test_influence_is_the_sum_over_all_routes() -> None:
    adjacency = random_graph()
    weights = torch.zeros(9, dtype=torch.float64)
    weights[:2] = torch.tensor([0.7, 0.3])
    normalised = shares(adjacency)
    expected = weights @ (torch.linalg.inv(torch.eye(9, dtype=torch.float64) - normalised) - torch.eye(9))
    torch.testing.assert_close(influences(normalised, weights), expected)


def test_a_graph_with_a_cycle_has_no_influence() -> None:
    cycle = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="cycle"):
        influences(cycle, torch.tensor([1.0, 0.0]))


def test_pruning_keeps_the_fewest_nodes_and_what_leads_to_a_target() -> None:
    # 0 is the target; 1 carries 0.9 of it, 2 carries 0.1; 3 feeds 1, 4 feeds 2.
    adjacency = torch.zeros(5, 5, dtype=torch.float64)
    adjacency[0, 1], adjacency[0, 2], adjacency[1, 3], adjacency[2, 4] = 9.0, -1.0, 2.0, 5.0
    weights = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    none = torch.zeros(5, dtype=torch.bool)
    features = torch.tensor([False, True, True, False, False])
    found = prune(adjacency, weights, none, needs_incoming=features, node_threshold=0.8, edge_threshold=1.0)
    assert found.influence.tolist() == pytest.approx([0, 0.9, 0.1, 0.9, 0.1])
    assert found.nodes.tolist() == [True, True, False, True, False]
    assert found.edges.nonzero().tolist() == [[0, 1], [1, 3]]
    everything = prune(adjacency, weights, none, needs_incoming=features, node_threshold=1.0, edge_threshold=1.0)
    assert everything.nodes.all()
    # Without what feeds it, a feature goes too.
    starved = prune(adjacency, weights, none, needs_incoming=features, node_threshold=0.4, edge_threshold=1.0)
    assert starved.nodes.tolist() == [True, False, False, False, False]


# ---- attribution graphs


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_every_row_of_an_attribution_graph_adds_up(family: str) -> None:
    run = tiny_run(family)
    chosen = top_logits(run, at_most=3)
    graph = build_graph(run, centred_logit_roots(run, [one for one, _ in chosen]), [p for _, p in chosen], SMALL)
    assert graph.incompleteness() < 1e-9
    assert graph.n_active == sum(active.n_active for active in run.transcoders.values())
    assert 0 < graph.replacement_score() < 1


SMALL = GraphSettings(max_features=10_000, block=7)


def whole_graph(run: LinearisedRun, settings: GraphSettings = SMALL) -> AttributionGraph:
    return build_graph(run, [logit_root(run, 5), logit_root(run, 6)], [0.6, 0.4], settings)


def test_a_whole_graph_has_a_row_for_every_feature_that_matters() -> None:
    run = tiny_run("gpt2")
    graph = whole_graph(run)
    sources = list_sources(run)
    expanded = [place for place, node in enumerate(graph.nodes) if graph.are(Kind.FEATURE)[place]]
    for place in expanded[:: max(1, len(expanded) // 10)]:
        node = graph.nodes[place]
        row = attribute(run, [feature_probe(run, node.layer or 0, node.token or 0, node.index or 0)], sources)[0]
        keys = {sources.nodes.node(column): float(row[column]) for column in torch.nonzero(row).flatten().tolist()}
        shown = {
            graph.nodes[column]: float(graph.adjacency[place, column])
            for column in torch.nonzero(graph.adjacency[place]).flatten().tolist()
        }
        assert shown
        assert all(value == pytest.approx(keys[source]) for source, value in shown.items())
    ends = {node.layer for place, node in enumerate(graph.nodes) if graph.are(Kind.FEATURE)[place]}
    assert ends == {0, 1, 2}


def test_a_small_graph_holds_the_most_influential_features_and_still_adds_up() -> None:
    run = tiny_run("gpt2")
    small = whole_graph(run, GraphSettings(max_features=5, block=1))
    assert int(small.are(Kind.FEATURE).sum()) == 5
    assert small.incompleteness() < 1e-9
    assert small.unexpanded.abs().sum() > 0
    # One at a time, the first chosen is the feature with most direct influence on the targets.
    rows = attribute(run, [logit_root(run, 5).probe, logit_root(run, 6).probe])
    sources = list_sources(run)
    rows = rows[:, : sources.attention_bias.start].abs()
    influence = torch.tensor([0.6, 0.4], dtype=torch.float64) @ (rows / rows.sum(1, keepdim=True))
    influence = influence * torch.from_numpy(sources.nodes.are(Kind.FEATURE)[: len(influence)])
    assert small.nodes[2] == sources.nodes.node(int(influence.argmax()))


def test_block_size_does_not_change_a_whole_graph() -> None:
    run = tiny_run("gpt2")
    one, other = whole_graph(run, GraphSettings(10_000, 1)), whole_graph(run, GraphSettings(10_000, 50))
    assert set(one.nodes) == set(other.nodes)
    order = [other.nodes.index(node) for node in one.nodes]
    torch.testing.assert_close(one.adjacency, other.adjacency[order][:, order], rtol=1e-9, atol=1e-12)


def test_pruned_graphs_keep_targets_and_tokens() -> None:
    run = tiny_run("gpt2")
    graph = whole_graph(run)
    pruned = graph.pruned(GraphSettings(node_threshold=0.5, edge_threshold=0.8))
    assert pruned.nodes[: graph.n_targets].all()
    assert pruned.nodes[graph.are(Kind.EMBEDDING)].all()
    assert 0 < int(pruned.nodes.sum()) < graph.n_nodes
    assert not pruned.edges[~pruned.nodes].any()
    assert not pruned.edges[:, ~pruned.nodes].any()


def test_top_logits_have_the_mass_asked_for() -> None:
    model, _ = tiny_model("gemma2", double=True)  # caps its logits
    run = tiny_run("gemma2")
    with torch.inference_mode():
        probabilities = model.bridge(run.tokens[None], return_type="logits", use_cache=False)[0, -1].softmax(-1)
    found = top_logits(run, mass=0.5, at_most=100)
    expected, ids = probabilities.sort(descending=True)
    n = int((expected.cumsum(0) < 0.5).sum()) + 1
    assert [one for one, _ in found] == ids[:n].tolist()
    assert [p for _, p in found] == pytest.approx(expected[:n].tolist(), rel=1e-5)


def test_layers_without_nodes_are_drawn_short_and_in_order() -> None:
    assert squeezed([0.0, 0.5, 1.5, 11.5, 11.25]) == {
        0.0: 0.0,
        0.5: 0.5,
        1.5: 1.5,
        11.25: 1.5 + 1 + 0.15 * 8.75,
        11.5: 4.0625,
    }
    assert squeezed([]) == {}
