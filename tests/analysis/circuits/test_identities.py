"""Every number of an attribution is a term of an exact sum, and what intervening on the frozen model shows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.analysis.circuits.attribution import FEW_ROOTS, attribute, dots_at_once, list_sources
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.operators import (
    head_contributions,
    norm_scale,
    pull_attention,
    pull_norm,
    push_attention,
    push_norm,
)
from tailrace.analysis.circuits.paths import SearchSettings, extensions, root_step
from tailrace.analysis.circuits.roots import (
    Root,
    centred_logit_roots,
    decoder_root,
    direction_root,
    feature_root,
    logit_root,
)
from tailrace.analysis.circuits.run import LinearisedRun, Part
from tailrace.analysis.splice.hook_points import hooked, observed
from tailrace.analysis.weights.model_weights import IDENTITY, AttentionWeights, Norm
from tests.support.circuit_runs import CASES, D_SAE, TOKENS, frozen_pass, recorded_pass, tiny_model, tiny_run

EXACT = 1e-9
"""Of Σ|terms|, in float64."""
ROUNDED = 1e-5
"""In float32."""


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_roots(run: LinearisedRun) -> list[Root]:
    """One root of every kind, active and inactive features of every layer among them."""
    roots = [
        logit_root(run, 5),
        logit_root(run, 7, -2, minus=9),
        direction_root(run, randoms(16), 3, 2),
        direction_root(run, randoms(16, seed=1), 1, 3, part=Part.MID),
        *centred_logit_roots(run, [3, 4]),
    ]
    for layer, active in run.transcoders.items():
        inactive = min(set(range(D_SAE)) - set(active.feature[active.at(4)].tolist()))
        last = int(active.feature[active.at(5)][0])
        roots += [feature_root(run, layer, last), feature_root(run, layer, inactive, 4), decoder_root(run, layer, last)]
    return roots


# ---- operators and their transposes


@pytest.mark.parametrize(
    "norm",
    [
        Norm("layer", weight=randoms(6, seed=1), bias=randoms(6, seed=2), eps=1e-5),
        Norm("rms", weight=randoms(6, seed=1), eps=1e-5),
        IDENTITY,
    ],
)
def test_pulling_through_a_norm_is_the_transpose_of_pushing(norm: Norm) -> None:
    x, dx, v = randoms(3, 6, seed=3), randoms(3, 6, seed=4), randoms(3, 6, seed=5)
    scale = norm_scale(norm, x)
    pushed, pulled = push_norm(norm, dx, scale), pull_norm(norm, v, scale)
    torch.testing.assert_close((pushed * v).sum(-1), (dx * pulled).sum(-1))


def test_pulling_through_attention_is_the_transpose_of_pushing_with_grouped_values() -> None:
    attention = AttentionWeights(randoms(2, 8, 3), randoms(4, 3, 8, seed=1))
    pattern = randoms(4, 5, 5, seed=2).tril().softmax(-1)
    x, v = randoms(2, 5, 8, seed=3), randoms(2, 5, 8, seed=4)
    pushed, pulled = push_attention(attention, pattern, x), pull_attention(attention, pattern, v)
    torch.testing.assert_close((pushed * v).sum((1, 2)), (x * pulled).sum((1, 2)))


def test_head_contributions_equal_dotting_every_written_vector() -> None:
    attention = AttentionWeights(randoms(2, 8, 3), randoms(4, 3, 8, seed=1))
    pattern, values, v = randoms(4, 5, seed=2), randoms(5, 2, 3, seed=3), randoms(8, seed=4)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for head, source in itertools.product(range(4), range(5)):
        written = values[source, head // 2] @ attention.W_O[head]  # heads 0, 1 share values 0; heads 2, 3 values 1
        expected[head, source] = pattern[head, source] * (written @ v)
    torch.testing.assert_close(head_contributions(attention, pattern, values, v), expected)


def test_a_norm_divides_by_its_scale_and_takes_the_mean_off_not_by_a_ratio_of_products() -> None:
    """D-45: (v·y)/(v·x) equals 1/scale only without a mean, and is noise where v·x is near zero."""
    norm = Norm("layer", eps=1e-5)
    centred = randoms(8) - randoms(8).mean()
    scale = norm_scale(norm, centred)
    v = randoms(8, seed=1)
    y = push_norm(norm, centred, scale)
    assert (v @ y) / (v @ centred) == pytest.approx(1 / float(scale))
    orthogonal = v - centred * (v @ centred) / (centred @ centred)
    pulled = pull_norm(norm, orthogonal, scale)
    assert abs(float(orthogonal @ centred)) < 1e-14  # the ratio would be 0/0
    torch.testing.assert_close(pulled, (orthogonal - orthogonal.mean()) / scale)
    shifted = centred + 3  # a mean that the norm takes off
    assert float(pulled @ shifted) == pytest.approx(float(orthogonal @ push_norm(norm, shifted, scale)))


# ---- completeness


@pytest.mark.parametrize(("family", "processing"), CASES)
def test_terms_of_every_root_sum_to_its_recorded_value_in_float64(family: str, processing: str) -> None:
    run = tiny_run(family, processing)
    for root in some_roots(run):
        terms = contributions(run, root.probe)
        assert terms.incompleteness(root.value) < EXACT, str(root.node)


@pytest.mark.parametrize(("family", "processing"), CASES)
def test_terms_through_attention_sum_to_the_recorded_values_in_float64(family: str, processing: str) -> None:
    run = tiny_run(family, processing)
    roots = some_roots(run)
    rows = attribute(run, [root.probe for root in roots])
    values = torch.tensor([root.value for root in roots], dtype=torch.float64)
    assert float(((rows.sum(1) - values).abs() / rows.abs().sum(1)).max()) < EXACT


@pytest.mark.parametrize(("family", "processing"), CASES)
def test_terms_sum_to_recorded_values_in_float32(family: str, processing: str) -> None:
    run = tiny_run(family, processing, double=False)
    roots = some_roots(run)
    rows = attribute(run, [root.probe for root in roots])
    for row, root in zip(rows, roots, strict=True):
        assert contributions(run, root.probe).incompleteness(root.value) < ROUNDED, str(root.node)
        assert abs(float(row.double().sum()) - root.value) < ROUNDED * float(row.double().abs().sum()), str(root.node)


def test_terms_sum_up_with_mlps_that_no_transcoder_stands_in_for() -> None:
    run = tiny_run("gpt2", layers=(1,))
    root = logit_root(run, 5)
    terms = contributions(run, root.probe)
    assert terms.incompleteness(root.value) < EXACT
    opaque = {(node.kind, node.layer) for node in terms.nodes.nodes(np.flatnonzero(terms.nodes.are(Kind.MLP)))}
    assert opaque == {(Kind.MLP, 0), (Kind.MLP, 2)}
    row = attribute(run, [root.probe])[0]
    assert abs(float(row.sum()) - root.value) < EXACT * float(row.abs().sum())


def test_a_step_further_back_every_node_is_explained_by_terms_that_sum_to_its_own_contribution() -> None:
    run = tiny_run("gpt2")
    root = feature_root(run, 2, int(run.transcoders[2].feature[-1]))
    everything = SearchSettings(branches=10_000, order="magnitude", ignore_bos=False, extend_layer_0=True)
    explained = {Kind.FEATURE: 0, Kind.HEAD: 0, Kind.SKIP: 0}
    for path in extensions(run, (root_step(root),), everything):
        step = path[-1]
        if step.probe is not None:
            explained[step.node.kind] += 1
            terms = contributions(run, step.probe)
            assert abs(terms.total - step.value) < EXACT * terms.magnitude, str(step.node)
    assert min(explained.values()) >= 1, explained


# ---- through attention


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_direct_effects_equal_the_sum_over_all_chains_of_heads_and_skips(family: str) -> None:
    run = tiny_run(family)
    root = feature_root(run, 1, int(run.transcoders[1].feature[run.transcoders[1].at(2)][0]), 2)
    chains: dict[Node, float] = defaultdict(float)
    everything = SearchSettings(branches=10_000, order="magnitude", ignore_bos=False, extend_layer_0=True)
    pending = [(root_step(root),)]
    while pending:
        for path in extensions(run, pending.pop(), everything):
            if path[-1].node.kind in (Kind.HEAD, Kind.SKIP):
                pending.append(path)  # type: ignore[arg-type]
            else:
                chains[path[-1].node] += path[-1].value
    sources = list_sources(run)
    row = attribute(run, [root.probe], sources)[0]
    kinds = (Kind.FEATURE, Kind.EMBEDDING, Kind.POSITION)
    places = np.flatnonzero(sources.nodes.are(*kinds))
    shown = {sources.nodes.node(int(place)): float(row[place]) for place in places if row[place] != 0}
    expected = {node: value for node, value in chains.items() if node.kind in kinds and value != 0}
    assert shown == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_many_roots_at_once_have_the_terms_of_few() -> None:
    run = tiny_run("gpt2")
    probes = [root.probe for root in some_roots(run)]
    many = probes * (FEW_ROOTS // len(probes) + 1)
    assert len(probes) <= FEW_ROOTS < len(many)
    torch.testing.assert_close(attribute(run, many)[: len(probes)], attribute(run, probes), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_products_of_all_tokens_at_once_are_those_of_each(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailrace.analysis.circuits.attribution._BYTES_AT_ONCE", at_once)
    features = tiny_run("gpt2").transcoders[1]
    assert len(set(features.starts.diff().tolist())) > 1
    for n_tokens in (1, 4, len(TOKENS)):
        v, W_dec = randoms(3, n_tokens, 16), features.transcoder.W_dec
        each = [v[:, token] @ W_dec[features.feature[features.at(token)]].T for token in range(n_tokens)]
        torch.testing.assert_close(dots_at_once(features, W_dec, v), torch.cat(each, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_roots_of_different_places_do_not_mix_in_one_block(family: str) -> None:
    run = tiny_run(family)
    probes = [root.probe for root in some_roots(run)]
    together = attribute(run, probes)
    alone = torch.cat([attribute(run, [probe]) for probe in probes])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


# ---- interventions on the model itself


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "gemma2", "olmo2"])
def test_an_edge_times_delta_is_what_changing_a_feature_does_to_the_frozen_model(family: str) -> None:
    run = tiny_run(family)
    model, weights = tiny_model(family, double=True)
    bridge, delta = model.bridge, 0.37
    recorded = recorded_pass(bridge, weights)
    sources = list_sources(run)
    target = feature_root(run, 2, int(run.transcoders[2].feature[run.transcoders[2].at(5)][0]), 5)
    logit = logit_root(run, 11, 5)
    rows = attribute(run, [target.probe, logit.probe], sources)

    feature_read = int(target.node.index or 0)
    reader = run.transcoders[2]
    slope = float(reader.slope[reader.pair_of(5, feature_read)])
    directions = {
        "blocks.2.mlp.hook_in": reader.transcoder.W_enc[feature_read] * slope,
        "ln_final.hook_out": weights.W_U[:, 11].double(),
    }
    for layer, token in itertools.product((0, 1), (2, 5)):
        active = run.transcoders[layer]
        place = active.at(token).start
        written = recorded[f"blocks.{layer}.mlp.hook_out"].clone()
        written[0, token] += delta * active.transcoder.W_dec[active.feature[place]]
        changed = {**recorded, f"blocks.{layer}.mlp.hook_out": written}
        with (
            torch.inference_mode(),
            frozen_pass(bridge, weights, changed),
            hooked(_skips_answer(bridge, run, recorded)),
            observed(bridge.hook_dict, list(directions)) as seen,
        ):
            bridge(TOKENS[None], return_type=None, use_cache=False)
        edges = rows[:, sources.features[layer].start + place] / active.activation[place]
        for edge, (name, direction) in zip(edges, directions.items(), strict=True):
            moved = float((seen[name] - recorded[name])[0, 5] @ direction)
            assert moved == pytest.approx(float(edge) * delta, rel=1e-8, abs=1e-14), (layer, token, name)
            # An MLP beside its layer's attention does not see what only that attention brings from another token.
            cannot_reach = weights.is_parallel and (layer, token, name) == (1, 2, "blocks.2.mlp.hook_in")
            assert abs(float(edge)) > 1e-6 or cannot_reach


def _skips_answer(bridge: Any, run: LinearisedRun, recorded: Mapping[str, torch.Tensor]) -> list[tuple[Any, Any]]:
    """Hooks that add what an MLP's skip path makes of the change of its input; the rest of the MLP is held."""
    functions: list[tuple[Any, Any]] = []
    for layer, active in run.transcoders.items():
        W_skip = active.transcoder.W_skip
        if W_skip is None:
            continue
        change: dict[str, torch.Tensor] = {}

        def remember(value, *, hook, change=change, layer=layer):
            change["in"] = value - recorded[f"blocks.{layer}.mlp.hook_in"]

        def answer(value, *, hook, change=change, W_skip=W_skip):
            answered = (change["in"] @ W_skip.T) * run.transcoded[None, :, None]
            return value + answered

        functions += [
            (bridge.hook_dict[f"blocks.{layer}.mlp.hook_in"], remember),
            (bridge.hook_dict[f"blocks.{layer}.mlp.hook_out"], answer),
        ]
    return functions
