"""Greedy paths: what a step is worth, which steps are taken, which paths are chosen, how they are shown."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.filters import COMPARATORS, Condition, NodeFilter
from tailrace.analysis.circuits.nodes import Kind, Node, node_columns
from tailrace.analysis.circuits.operators import pull_norm
from tailrace.analysis.circuits.path_graph import graph_of_paths
from tailrace.analysis.circuits.paths import (
    SearchSettings,
    Step,
    extensions,
    root_of_step,
    root_step,
    search_paths,
    select_paths,
    show_path,
    show_paths,
    top_ends,
)
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import decoder_root, direction_root, feature_root, logit_root
from tailrace.storage.errors import ModelError, SettingsError
from tests.support.circuit_runs import (
    ROOT,
    TOKENS,
    A,
    B,
    H,
    exact_norms,
    feature,
    first_active,
    mixed_transcoders,
    mlp_site,
    path,
    random_transcoder,
    tiny_model,
    tiny_run,
)

ONES = torch.ones(16)

# ---- the search


def test_steps_are_the_largest_terms_and_signed_order_leaves_out_what_inhibits() -> None:
    run = tiny_run("gpt2")
    root = feature_root(run, 2, first_active(run, 2))
    terms = contributions(run, root.probe)
    searched = terms.nodes.are(Kind.FEATURE, Kind.HEAD, Kind.SKIP, Kind.EMBEDDING, Kind.POSITION, Kind.MLP)
    searched &= ~(terms.nodes.are(Kind.HEAD) & (terms.nodes.token == 0))
    values = np.where(searched, terms.values, 0)
    found = extensions(run, (root_step(root),), SearchSettings(branches=4))
    assert [step.value for _, step in found] == sorted(values, reverse=True)[:4]
    by_size = extensions(run, (root_step(root),), SearchSettings(branches=4, order="magnitude"))
    assert [abs(one[-1].value) for one in by_size] == sorted(np.abs(values), reverse=True)[:4]
    assert any(one[-1].value < 0 for one in by_size)


def test_rounds_keep_the_best_extensions_of_all_paths_together() -> None:
    run = tiny_run("llama")
    root = logit_root(run, 5)
    rounds = search_paths(run, root, SearchSettings(iterations=2, branches=3))
    assert [len(paths) for paths in rounds] == [3, 3]
    assert {len(one) for one in rounds[1]} == {3}
    candidates = [longer for one in rounds[0] for longer in extensions(run, one, SearchSettings(branches=3))]
    best = sorted((one[-1].value for one in candidates), reverse=True)[:3]
    assert [one[-1].value for one in rounds[1]] == best


def test_more_heads_and_sources_than_heads_can_be_steps() -> None:
    """D-49: the best of heads × sources, not as many as there are heads."""
    run = tiny_run("gpt2")
    settings = SearchSettings(branches=50, order="magnitude", keep=NodeFilter.parse(["kind=head", "layer=2"]))
    found = extensions(run, (root_step(logit_root(run, 5)),), settings)
    assert len(found) == 4 * 5  # 4 heads, 5 sources behind the BOS


def test_a_filter_chooses_among_all_terms_and_not_among_the_best() -> None:
    """D-50."""
    run = tiny_run("gpt2")
    root = root_step(feature_root(run, 2, first_active(run, 2)))
    best = extensions(run, (root,), SearchSettings(branches=1))[0][-1].node
    text = {Kind.HEAD: "kind!=head", Kind.FEATURE: "kind!=feature"}.get(best.kind, f"kind!={best.kind}")
    found = extensions(run, (root,), SearchSettings(branches=1, keep=NodeFilter.parse([text])))
    assert len(found) == 1
    assert found[0][-1].node.kind != best.kind


def test_a_prompt_of_one_token_has_terms_and_no_heads_to_search() -> None:
    """D-51: BOS-only prompts crashed."""
    model, weights = tiny_model("gpt2", double=True)
    everywhere = torch.ones(1, dtype=torch.bool)
    with exact_norms(model.bridge, weights):
        run = record_run(model.bridge, weights, mixed_transcoders(), TOKENS[:1], transcoded=everywhere)
    root = feature_root(run, 2, int(run.transcoders[2].feature[0]), 0)
    assert contributions(run, root.probe).incompleteness(root.value) < 1e-9
    found = extensions(run, (root_step(root),), SearchSettings(branches=1000, order="magnitude"))
    assert found
    assert all(one[-1].node.kind is not Kind.HEAD for one in found)


def test_a_cap_is_the_smallest_value_of_any_feature_on_the_path_not_the_last() -> None:
    """D-52: every feature overwrote the cap."""
    run = tiny_run("gpt2")
    root = feature_root(run, 2, first_active(run, 2))
    keep = NodeFilter.parse(["kind=feature"])
    settings = SearchSettings(branches=1000, order="magnitude", cap=True, keep=keep)
    raw = SearchSettings(branches=1000, order="magnitude", keep=keep)
    step = next(one[-1] for one in extensions(run, (root_step(root),), raw) if one[-1].value > 0)
    near, far = Step(root.node, root.probe, 0.01), dataclasses.replace(step, value=5.0)  # the smaller one is not last
    assert {one[-1].node.kind for one in extensions(run, (near, far), settings)} == {Kind.FEATURE}
    for capped, plain in zip(
        sorted(extensions(run, (near, far), settings), key=lambda one: str(one[-1].node)),
        sorted(extensions(run, (near, far), raw), key=lambda one: str(one[-1].node)),
        strict=True,
    ):
        assert capped[-1].value == min(plain[-1].value, 0.01)
        assert capped[-1].is_capped == (plain[-1].value > 0.01)


def test_a_cap_bounds_only_what_acts_the_same_way() -> None:
    from tailrace.analysis.circuits.paths import _capped

    steps = path((ROOT, 3.0), (A, -2.0), (B, -0.5), (H, 0.1))
    values, is_capped = _capped(np.array([-9.0, -0.4, 0.3, 9.0]), steps)
    assert values.tolist() == [-0.5, -0.4, 0.3, 3.0]  # heads have no activation to lose
    assert is_capped.tolist() == [True, False, False, True]


def test_capped_values_are_refused_where_values_are_summed() -> None:
    capped = (*path((ROOT, 3.0)), dataclasses.replace(path((A, 1.0))[0], is_capped=True))
    with pytest.raises(ValueError, match=r"mlp1tc\[4\]@5 were capped and do not add up"):
        graph_of_paths([capped])
    with pytest.raises(ValueError, match="capped"):
        top_ends([capped])


# ---- roots


def test_a_step_as_root_is_explained_with_its_own_vector_and_value() -> None:
    """D-53: path elements got the norm twice and an activation for a contribution."""
    run = tiny_run("gpt2")
    start = root_step(feature_root(run, 2, first_active(run, 2)))
    settings = SearchSettings(branches=8, order="magnitude")
    for one in extensions(run, (start,), settings):
        if one[-1].probe is not None:
            root = root_of_step(one[-1])
            assert root.probe is one[-1].probe
            assert root.value == one[-1].value
            again = [longer[-1].value for longer in extensions(run, (root_step(root),), settings)]
            assert again == [longer[-1].value for longer in extensions(run, one, settings)]


def test_a_decoder_root_reads_the_mlps_output_as_it_is() -> None:
    """D-54: decoder directions got the scale of the norm before the MLP."""
    run = tiny_run("gpt2")
    root = decoder_root(run, 1, 3)
    W_dec = run.transcoders[1].transcoder.W_dec[3]
    assert torch.equal(root.probe.vector, W_dec)
    assert root.value == pytest.approx(float(run.layers[1].mlp_out[5] @ W_dec))
    terms = contributions(run, root.probe)
    assert {run_node.layer for run_node in terms.nodes.nodes(range(terms.nodes.n_nodes))} == {1}


def test_a_logit_root_goes_through_the_final_norm_and_a_direction_is_left_as_it_is() -> None:
    """D-55: directions of the last stream ignored the final norm."""
    model, weights = tiny_model("gpt2", double=True)
    run = tiny_run("gpt2")
    with torch.inference_mode(), exact_norms(model.bridge, weights):
        logits = model.bridge(TOKENS[None], return_type="logits", use_cache=False)[0]
    assert logit_root(run, 5).value == pytest.approx(float(logits[-1, 5]))
    assert logit_root(run, 5, -2, minus=9).value == pytest.approx(float(logits[-2, 5] - logits[-2, 9]))
    W_U = weights.W_U[:, 5].double()
    expected = pull_norm(run.weights.final_norm, W_U, run.scale_final[5])
    torch.testing.assert_close(logit_root(run, 5).probe.vector, expected)
    plain = direction_root(run, W_U, run.n_layers)
    assert torch.equal(plain.probe.vector, W_U)
    assert plain.value == pytest.approx(float(run.stream[-1] @ W_U))


def test_tokens_counted_from_the_end_are_the_same_roots() -> None:
    """D-55: @-1 and @9 were two names of one position."""
    run = tiny_run("gpt2")
    index = first_active(run, 2)
    assert feature_root(run, 2, index, -1).node == feature_root(run, 2, index, 5).node == feature(2, index)


def test_paths_end_at_heads_of_layer_0_unless_asked_to_go_on_to_the_embeddings_they_read() -> None:
    """The embedding behind such a head says the same again, and takes a branch from another path."""
    run = tiny_run("gpt2")
    root = logit_root(run, 5)
    settings = SearchSettings(branches=1000, order="magnitude")
    first = [one for one in extensions(run, (root_step(root),), settings) if one[-1].node.kind is Kind.HEAD]
    ends = [one for one in first if one[-1].node.layer == 0]
    assert ends
    further = dataclasses.replace(settings, extend_layer_0=True)
    for one in ends:
        assert extensions(run, one, settings) == []
        assert {longer[-1].node.kind for longer in extensions(run, one, further)} == {Kind.EMBEDDING, Kind.POSITION}
    assert all(extensions(run, one, settings) for one in first if one[-1].node.layer == 1)


def test_a_search_that_finds_nothing_returns_no_rounds_and_shows_no_lines() -> None:
    """D-55: exhausted searches appended empty lists, on which all else failed."""
    run = tiny_run("gpt2")
    nothing = SearchSettings(iterations=4, keep=NodeFilter.parse(["token=99"]))
    rounds = search_paths(run, logit_root(run, 5), nothing)
    assert rounds == []
    to_the_end = SearchSettings(iterations=4, branches=2, keep=NodeFilter.parse(["kind=embedding"]))
    assert [len(paths) for paths in search_paths(run, logit_root(run, 5), to_the_end)] == [1]
    assert select_paths([]) == []
    assert top_ends([]) == []


def test_an_inactive_root_is_explained_and_says_that_it_is_inactive() -> None:
    run = tiny_run("gpt2")
    active = set(run.transcoders[0].feature[run.transcoders[0].at(5)].tolist())
    inactive = min(set(range(24)) - active)
    root = feature_root(run, 0, inactive)
    assert not root.is_active
    coder = run.transcoders[0].transcoder
    assert root.value == pytest.approx(float(coder.pre_activations(run.layers[0].mlp_in[5])[inactive]))


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda run: feature_root(run, 1, 24), "feature 1:24: this transcoder has features 0 to 23"),
        (lambda run: feature_root(run, 1, 0, 6), r"token 6: the prompt has 6 tokens, 0 to 5 \(or -6 to -1"),
        (lambda run: feature_root(run, 1, 0, 0), "token 0: transcoders do not stand in there"),
        (lambda run: feature_root(run, 2, 0), "layer 2: no transcoder of it was given; layers with one: 0, 1"),
        (lambda run: logit_root(run, 5, minus=10_000), r"token ids \[10000\]: this model has 0 to"),
        (lambda run: logit_root(run, 5, minus=5), "logit difference: both are token 5"),
        (lambda run: direction_root(run, torch.ones(3), 9), r"wanted \(16,\) and a layer from 0 to 3"),
    ],
)
def test_roots_that_do_not_exist_are_refused(ask, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        ask(tiny_run("gpt2", layers=(0, 1)))


# ---- recording


def test_errors_come_from_the_recorded_pass_even_where_the_mlp_is_replaced() -> None:
    """D-48: the error called whatever MLP the model had at the moment, with whatever input."""
    from tailrace.analysis.splice.replacement import ZeroAblated, replaced

    model, weights = tiny_model("gpt2", double=True)
    run = tiny_run("gpt2")
    coder = run.transcoders[1]
    expected = run.layers[1].mlp_out[3] - coder.transcoder(run.layers[1].mlp_in[3])
    torch.testing.assert_close(coder.error[3], expected)
    with exact_norms(model.bridge, weights), replaced(model.bridge, {mlp_site(2): ZeroAblated()}):
        inside = record_run(model.bridge, weights, mixed_transcoders(), TOKENS)
    assert not inside.layers[2].mlp_out[1:].any()
    torch.testing.assert_close(coder.error[3], inside.transcoders[1].error[3])
    root = logit_root(inside, 5)
    assert contributions(inside, root.probe).incompleteness(root.value) < 1e-9


def test_transcoders_of_anything_but_an_mlp_are_refused() -> None:
    """D-42: any transcoder was accepted and given normalised inputs; see also ``test_what_reads_the_stream_itself``."""
    model, weights = tiny_model("gpt2")
    coder = random_transcoder()
    wrong = {
        dataclasses.replace(mlp_site(0), hook_in="blocks.0.hook_resid_pre"): coder,
        dataclasses.replace(mlp_site(1), hook_in="blocks.0.mlp.hook_in"): coder,
        mlp_site(2): coder,
        dataclasses.replace(mlp_site(2), name="again"): coder,
        dataclasses.replace(mlp_site(1), name="far", hook_out="blocks.7.mlp.hook_out"): coder,
    }
    with pytest.raises(ModelError) as caught:
        record_run(model.bridge, weights, wrong, TOKENS)
    message = str(caught.value)
    assert (
        "site layer0: blocks.0.hook_resid_pre to blocks.0.mlp.hook_out does not hold the input and output of one"
        in message
    )
    assert (
        "site layer1: blocks.0.mlp.hook_in to blocks.1.mlp.hook_out does not hold the input and output of one"
        in message
    )
    assert "site again: layer 2 has two transcoders" in message
    assert "site far: this model has no hook 'blocks.7.mlp.hook_out'" in message


def test_layers_without_a_transcoder_are_refused_by_what_depends_on_them_unless_allowed() -> None:
    model, weights = tiny_model("gpt2")
    run = record_run(model.bridge, weights, mixed_transcoders((0, 2)), TOKENS)
    assert feature_root(run, 0, 3).value != 0  # nothing below is missing
    for ask in (lambda: feature_root(run, 2, 3), lambda: logit_root(run, 5), lambda: direction_root(run, ONES, 2)):
        with pytest.raises(SettingsError, match="layers 1: no transcoder of them was given"):
            ask()
    allowed = record_run(model.bridge, weights, mixed_transcoders((0, 2)), TOKENS, allow_opaque=True)
    assert contributions(allowed, feature_root(allowed, 2, 3).probe).sum_of(Kind.MLP) != 0


def test_a_transcoders_layer_is_its_hooks_and_not_its_place_in_a_list() -> None:
    """D-43: position L had to hold layer L's transcoder."""
    model, weights = tiny_model("gpt2", double=True)
    coders = mixed_transcoders()
    backwards = dict(reversed(coders.items()))
    with exact_norms(model.bridge, weights):
        run = record_run(model.bridge, weights, backwards, TOKENS)
    expected = tiny_run("gpt2")
    for layer in range(3):
        assert torch.equal(run.transcoders[layer].activation, expected.transcoders[layer].activation)


def test_a_model_whose_parts_do_not_add_up_is_refused() -> None:
    model, weights = tiny_model("gpt2")
    layer = weights.layers[1]
    wrong = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, b_O=torch.ones(16)))
    layers = (weights.layers[0], wrong, weights.layers[2])
    with pytest.raises(ModelError, match="block 1: attention's output is not its values mixed by its patterns"):
        record_run(model.bridge, dataclasses.replace(weights, layers=layers), mixed_transcoders(), TOKENS)


def test_a_transcoder_that_overflows_is_refused() -> None:
    model, weights = tiny_model("gpt2")
    coders = mixed_transcoders()
    broken = coders[mlp_site(1)]
    broken.b_dec_out[3] = float("inf")
    with pytest.raises(ModelError, match="block 1: its transcoder writes NaN or infinity"):
        record_run(model.bridge, weights, coders, TOKENS)


# ---- filters and choosing paths

NODES = [ROOT, A, B, H, Node(Kind.EMBEDDING, 0, 5), Node(Kind.LOGIT, 3, 5, 2)]


@pytest.mark.parametrize("comparator", COMPARATORS)
@pytest.mark.parametrize(
    ("field", "value", "attribute"),
    [("layer", 1, "layer"), ("token", 5, "token"), ("head", 2, "index"), ("feature", 4, "index")],
)
def test_every_comparator_is_honoured_for_every_number(field: str, value: int, attribute: str, comparator: str) -> None:
    """D-56: all but = and != were silently true of heads and features."""
    kinds = {"head": Kind.HEAD, "feature": Kind.FEATURE}
    for node, shift in itertools.product(NODES, (-1, 0, 1)):
        has_it = field not in kinds or node.kind is kinds[field]
        own = getattr(node, attribute)
        expected = COMPARATORS[comparator](own, value + shift) if has_it else comparator == "!="
        assert Condition(field, comparator, value + shift).holds(node_columns([node]))[0] == expected, (node, shift)


def test_kinds_and_places_are_compared_by_name() -> None:
    def matching(*texts: str) -> list[Node]:
        kept = NodeFilter.parse(texts).holds(node_columns(NODES))
        return [node for node, keep in zip(NODES, kept, strict=True) if keep]

    assert matching("kind=head") == [H]
    assert matching("kind!=feature") == NODES[3:]
    assert matching("place=resid_mid") == [ROOT, A, B]
    assert matching("place<resid_mid") == NODES[3:]
    assert matching("kind = feature", "layer>=1", "feature<7") == [A]
    assert matching() == NODES


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("token~9", "write a field, a comparator and a value"),
        ("colour=9", "field 'colour' is not one of"),
        ("kind=neuron", "kind 'neuron' is not one of feature, head"),
        ("kind>head", "kinds have no order"),
        ("layer=first", "layer 'first' is not a whole number"),
    ],
)
def test_filters_that_mean_nothing_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        NodeFilter.parse(["layer<8", text])


def test_paths_are_chosen_by_all_criteria_at_once_each_path_once() -> None:
    """D-57: criteria were joined by OR with duplicates, and none of them chose nothing."""
    ab, ah, b, only_root = (
        path((ROOT, 3.0), (A, 1.0), (B, 0.5)), path((ROOT, 3.0), (A, 1.0), (H, 0.4)), path((ROOT, 3.0), (B, 0.2)),
        path((ROOT, 3.0)),
    )  # fmt: skip
    everything = [ab, ah, b, only_root]
    is_a, is_head, is_b = (NodeFilter.parse([text]) for text in ("feature=4", "kind=head", "feature=1"))
    assert select_paths(everything) == everything
    assert select_paths(everything, infix=[is_a]) == [ab, ah]
    assert select_paths(everything, infix=[is_a], suffix=[is_b]) == [ab]
    assert select_paths(everything, not_infix=[is_a, is_head]) == [ab, b, only_root]  # shorter ones are kept
    assert select_paths(everything, suffix=[is_a, is_head]) == [ah]


def test_an_infix_is_found_behind_a_partial_match() -> None:
    """D-57: the search did not start again after a match that failed half-way."""
    aab = path((A, 3.0), (A, 1.0), (B, 0.5))
    is_a, is_b = NodeFilter.parse(["feature=4"]), NodeFilter.parse(["feature=1"])
    assert select_paths([aab], infix=[is_a, is_b]) == [aab]
    assert select_paths([aab], not_infix=[is_a, is_b]) == []


# ---- showing


def test_paths_are_shown_in_the_usual_notation() -> None:
    embedding = Node(Kind.EMBEDDING, 0, 3)
    one = path((ROOT, 16.3), (H, 0.2534), (embedding, -0.1))
    assert show_path(one) == "mlp2tc[7]@5: 16 <- attn1[2]@3: 0.25 <- embed0@3: -0.1"
    assert show_path(one, with_values=False) == "mlp2tc[7]@5 <- attn1[2]@3 <- embed0@3"
    assert show_paths([one], 1) == [f"Path [1][0]: {show_path(one)}"]


def test_ends_are_summed_by_node_with_or_without_tokens() -> None:
    elsewhere = dataclasses.replace(B, token=3)
    paths = [path((ROOT, 3.0), (B, 0.5)), path((ROOT, 3.0), (A, 2.0), (B, 0.25)), path((ROOT, 3.0), (elsewhere, 0.1))]
    assert top_ends(paths) == [(B, 0.75), (elsewhere, 0.1)]
    ((node, value),) = top_ends(paths, by_token=False)
    assert node == B.without_token()
    assert value == pytest.approx(0.85)
    assert top_ends(paths, keep=NodeFilter.parse(["token=3"])) == [(elsewhere, 0.1)]
