"""Edits of a cross-layer transcoder's features: a change is added at the feature's own and all later layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.features import Ablate, Add, Clamp, Edit, EditedFeatures, KeepOnly
from tailrace.analysis.splice.replacement import Substitute, Transcoded, ZeroAblated, replaced, run_replaced
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError
from tailrace.training.cross_layer.layers import StackedLayer, split_layers
from tests.support.circuit_runs import tiny_model
from tests.support.cross_layer_transcoders import D_SAE, random_cross_layer
from tests.support.spliced_models import TOKENS, WIDTH, mlp_site

SITES = [mlp_site(layer) for layer in range(3)]
WHOLE = random_cross_layer(width=WIDTH, n_layers=3, seed=3).double()
IS_ROW = (torch.arange(TOKENS.shape[1]) > 0)[None, :, None]
EXACT = 1e-9
"""Of logits of size 1, in float64: the products are summed in another order."""
EDITS: list[tuple[int, Edit]] = [
    (0, Ablate(tuple(range(0, D_SAE, 2)))),
    (1, Clamp((4, 9), 3.0)),
    (2, Add((7,), 2.0)),
    (0, KeepOnly((1, 5))),
]


def layers() -> dict[Site, StackedLayer]:
    return dict(zip(SITES, split_layers(WHOLE, SITES), strict=True))


def by_hand(edits: Sequence[tuple[int, Edit]], *, on_top_of: str) -> Tensor:
    """Return logits with hooks on the model's own MLPs that add every decoder of every layer, one by one."""
    model, _ = tiny_model("gpt2", double=True)
    points = model.bridge.hook_dict
    before: list[Tensor] = []
    after: list[Tensor] = []

    def read(value: Tensor, *, hook: Any) -> None:
        layer = len(before)
        acts = WHOLE.encode_layer(layer, value)
        before.append(acts)
        for where, edit in edits:
            acts = edit(acts) if where == layer else acts
        after.append(acts)

    def write(value: Tensor, *, hook: Any) -> Tensor:
        target = len(before) - 1
        shown = after if on_top_of == "transcoder" else [new - old for new, old in zip(after, before, strict=True)]
        start = WHOLE.b_dec_out[target * WIDTH : (target + 1) * WIDTH] if on_top_of == "transcoder" else value
        made = start + sum(shown[source] @ WHOLE.writes(source, target) for source in range(target + 1))
        return torch.where(IS_ROW, made, value)

    for site in SITES:
        points[site.hook_in].add_hook(read)
        points[site.hook_out].add_hook(write)
    try:
        with torch.inference_mode():
            logits: Tensor = model.bridge(TOKENS % 70, return_type="logits", use_cache=False)
    finally:
        for site in SITES:
            points[site.hook_in].remove_hooks("fwd")
            points[site.hook_out].remove_hooks("fwd")
    return logits


def run(substitutes: dict[Site, Substitute]) -> Tensor:
    with torch.inference_mode():
        return run_replaced(tiny_model("gpt2", double=True)[0].bridge, TOKENS % 70, substitutes)


@pytest.mark.parametrize(("layer", "edit"), EDITS)
def test_in_place_an_edit_reaches_every_layer_that_the_feature_writes_to(layer: int, edit: Edit) -> None:
    edited: dict[Site, Substitute] = {
        site: EditedFeatures(own, [edit] if own.index == layer else []) for site, own in layers().items()
    }
    logits = run(edited)
    assert float((logits - by_hand([(layer, edit)], on_top_of="transcoder")).abs().max()) < EXACT
    assert float((logits - by_hand([], on_top_of="transcoder")).abs().max()) > 1e-4, "the edit counts"


@pytest.mark.parametrize(("layer", "edit"), EDITS)
def test_on_top_of_the_model_one_edited_layer_brings_its_later_layers_along(layer: int, edit: Edit) -> None:
    site = SITES[layer]
    logits = run({site: EditedFeatures(layers()[site], [edit], on_top_of="model")})
    assert float((logits - by_hand([(layer, edit)], on_top_of="model")).abs().max()) < EXACT
    assert float((logits - run({})).abs().max()) > 1e-4, "the edit counts"


def test_edits_of_several_layers_add_up_and_none_leaves_the_model_as_it_is() -> None:
    edits = [EDITS[0], EDITS[2]]
    by_site: dict[Site, Substitute] = {
        SITES[layer]: EditedFeatures(layers()[SITES[layer]], [edit], on_top_of="model") for layer, edit in edits
    }
    assert float((run(by_site) - by_hand(edits, on_top_of="model")).abs().max()) < EXACT
    none = EditedFeatures(layers()[SITES[0]], [], on_top_of="model")
    assert torch.equal(run({SITES[0]: none}), run({}))


def test_what_a_caller_puts_at_a_later_layer_stays() -> None:
    steered = EditedFeatures(layers()[SITES[0]], [EDITS[1][1]], on_top_of="model")
    zero = run({SITES[0]: steered, SITES[1]: ZeroAblated(), SITES[2]: ZeroAblated()})
    assert not torch.equal(zero, run({SITES[0]: steered}))


def test_in_nested_contexts_the_inner_transcoder_counts() -> None:
    bridge = tiny_model("gpt2", double=True)[0].bridge
    outer: dict[Site, Substitute] = {site: Transcoded(own) for site, own in layers().items()}
    inner: dict[Site, Substitute] = {
        site: EditedFeatures(own, [EDITS[1][1]] if own.index == 1 else []) for site, own in layers().items()
    }
    with torch.inference_mode(), replaced(bridge, outer), replaced(bridge, inner):
        nested = bridge(TOKENS % 70, return_type="logits", use_cache=False)
    assert torch.equal(nested, run(inner))


def test_a_layer_alone_or_at_another_site_is_refused() -> None:
    own = layers()
    with pytest.raises(ModelError, match=r"site layer1: is a layer .* put layer0, layer2 in place too"):
        run({SITES[1]: Transcoded(own[SITES[1]])})
    with pytest.raises(ModelError, match=r"stands in for blocks\.0\.mlp\.hook_out, not for blocks\.1\.mlp\.hook_out"):
        run({SITES[1]: EditedFeatures(own[SITES[0]], [], on_top_of="model")})
    with pytest.raises(ModelError, match="put all its layers in place"):
        Transcoded(own[SITES[1]])(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH))
