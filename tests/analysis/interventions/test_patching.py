"""Patches put the values of one run into another, exactly there, inside any replacement, and leave nothing behind."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.experiment import PatchPlace, patching_effects
from tailrace.analysis.interventions.features import Clamp, EditedFeatures
from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.metrics import LogitDifference
from tailrace.analysis.interventions.patching import Patch, head_hooks, hook_of, patched
from tailrace.analysis.interventions.prompts import Prompts, pad_prompts
from tailrace.analysis.splice.replacement import EVERY_POSITION, Substitute, Transcoded, ZeroAblated, replaced
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError, TextError
from tests.support.spliced_models import (
    D_HEAD,
    N_LAYERS,
    mlp_site,
    plain_logits,
    plain_model,
    random_transcoder,
    tiny_model,
)

FAMILIES = ("gpt2", "llama", "gemma2")
SOURCE = pad_prompts([[2, 9, 17, 33, 40], [2, 21, 8]])
TARGET = pad_prompts([[2, 50, 17, 61, 44], [2, 21, 12]])
METRIC = LogitDifference(5, 6)
REPLACEMENT: dict[Site, Substitute] = {
    mlp_site(layer): Transcoded(random_transcoder(seed=layer)) for layer in range(N_LAYERS)
}


def hooks_left(bridge: Any) -> list[str]:
    return [name for name, point in bridge.hook_dict.items() if point.has_hooks()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("substitutes", [{}, REPLACEMENT], ids=["plain", "replaced"])
def test_patching_the_whole_stream_makes_the_source_of_the_target(family: str, substitutes: Any) -> None:
    # inside one and the same replacement: a source run outside it would leave the transcoders' error in the effect
    places = [PatchPlace("blocks.0.hook_resid_pre"), PatchPlace("blocks.2.hook_resid_pre")]
    result = patching_effects(
        tiny_model(family).bridge,
        source=SOURCE, target=TARGET, places=places, metric=METRIC, substitutes=substitutes, where=EVERY_POSITION,
    )  # fmt: skip
    assert (result.source - result.target).abs().min() > 1e-3
    torch.testing.assert_close(result.patched, result.source.expand(2, 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.restored(), torch.ones(2, 2, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert hooks_left(tiny_model(family).bridge) == []


def test_source_and_target_are_both_run_inside_the_replacement() -> None:
    bridge = tiny_model().bridge
    result = patching_effects(bridge, source=SOURCE, target=TARGET, places=[], metric=METRIC, substitutes=REPLACEMENT)
    for prompts, found in ((SOURCE, result.source), (TARGET, result.target)):
        assert torch.equal(found, METRIC(forward(bridge, prompts, substitutes=REPLACEMENT)))
        assert not torch.equal(found, METRIC(forward(bridge, prompts)))
    assert result.patched.shape == (0, 2)


PROJECTIONS = {"gpt2": "h.1.attn.c_proj", "llama": "layers.1.self_attn.o_proj"}


@pytest.mark.parametrize("family", sorted(PROJECTIONS))
@pytest.mark.parametrize("head", [0, 3])
def test_one_head_at_one_position_equals_the_same_columns_swapped_by_hand(family: str, head: int) -> None:
    columns, position = slice(head * D_HEAD, (head + 1) * D_HEAD), 3
    plain = plain_model(family)
    module = next(module for name, module in plain.named_modules() if name.endswith(PROJECTIONS[family]))
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    with torch.inference_mode():
        plain(SOURCE.tokens[:1])
    handle.remove()

    def swap(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = inputs[0].clone()
        z[:, position, columns] = seen[0][:, position, columns]
        return (z, *inputs[1:])

    module.register_forward_pre_hook(swap)
    with torch.inference_mode():
        expected = plain(TARGET.tokens[:1]).logits
    one = Prompts(TARGET.tokens[:1], TARGET.lengths[:1])
    source = forward(tiny_model(family).bridge, SOURCE, hooks=["blocks.1.attn.hook_z"])
    patch = Patch(f"blocks.1.attn.hook_z[{head}]", source.observed["blocks.1.attn.hook_z"][:1], one.at(position))
    found = forward(tiny_model(family).bridge, one, patches=[patch]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - forward(tiny_model(family).bridge, one).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "pattern"])
def test_patching_every_head_in_turn_covers_the_hook_and_each_head_counts(family: str, kind: Any) -> None:
    bridge = tiny_model(family).bridge
    hook = hook_of(kind, 2)
    source = forward(bridge, SOURCE, hooks=[hook]).observed[hook]
    names = head_hooks(bridge, kind, [2])
    assert len(names) == (2 if kind in ("k", "v") and family != "gpt2" else 4)
    whole = forward(bridge, TARGET, patches=[Patch(hook, source)]).last_logits
    each = forward(bridge, TARGET, patches=[Patch(name, source) for name in names]).last_logits
    torch.testing.assert_close(each, whole)
    plain = forward(bridge, TARGET).last_logits
    for name in names:
        assert (forward(bridge, TARGET, patches=[Patch(name, source)]).last_logits - plain).abs().max() > 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_patched_together_are_the_layers_attention(family: str) -> None:
    # a head's keys and values are one place of the study of "caught"
    together = PatchPlace(hook_of("q", 1), also=(hook_of("k", 1), hook_of("v", 1)))
    places = [together, PatchPlace(hook_of("attn_out", 1)), PatchPlace(hook_of("v", 1))]
    result = patching_effects(
        tiny_model(family).bridge, source=SOURCE, target=TARGET, places=places, metric=METRIC, substitutes=REPLACEMENT
    )
    torch.testing.assert_close(result.patched[0], result.patched[1], rtol=1e-4, atol=1e-5)
    assert (result.patched[0] - result.patched[2]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_what_a_layer_adds_to_the_stream_is_patched_after_any_norm_behind_it(kind: Any) -> None:
    bridge = tiny_model("gemma2").bridge
    hook = hook_of(kind, 1)
    source = forward(bridge, SOURCE, hooks=[hook]).observed[hook]
    streams = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"]
    run = forward(bridge, TARGET, patches=[Patch(hook, source)], hooks=streams)
    before, middle, after = (run.observed[name] for name in streams)
    added = middle - before if kind == "attn_out" else after - middle
    torch.testing.assert_close(added, source, rtol=1e-4, atol=1e-5)


def test_a_patch_inside_a_replacement_beats_it_and_around_it_is_beaten() -> None:
    bridge = tiny_model().bridge
    values = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    hook = hook_of("mlp_out", 1)
    zero: dict[Site, Substitute] = {mlp_site(1): ZeroAblated()}
    with torch.inference_mode():
        with replaced(bridge, zero, where=EVERY_POSITION), patched(bridge, [Patch(hook, values)]):
            inner_patch = bridge(TARGET.tokens, return_type="logits", use_cache=False)
        with patched(bridge, [Patch(hook, values)]), replaced(bridge, zero, where=EVERY_POSITION):
            outer_patch = bridge(TARGET.tokens, return_type="logits", use_cache=False)
    assert torch.equal(inner_patch, forward(bridge, TARGET, patches=[Patch(hook, values)]).logits)
    assert torch.equal(outer_patch, forward(bridge, TARGET, substitutes=zero, where=EVERY_POSITION).logits)


def test_contexts_entered_and_left_in_any_order_or_by_an_exception_restore_the_model() -> None:
    bridge = tiny_model().bridge
    before = plain_logits(tiny_model())
    values = torch.zeros(2, 10, 16)

    def contexts() -> list[Any]:
        steered: Substitute = EditedFeatures(random_transcoder(), [Clamp((1,), value=3.0)], on_top_of="model")
        return [
            replaced(bridge, {mlp_site(0): ZeroAblated()}),
            patched(bridge, [Patch(hook_of("mlp_out", 0), values), Patch(hook_of("attn_out", 1), values)]),
            replaced(bridge, {mlp_site(1): steered}),
        ]

    for entered, left in itertools.product(itertools.permutations(range(3)), repeat=2):
        opened, stacks = contexts(), [ExitStack() for _ in range(3)]
        for which in entered:
            stacks[which].enter_context(opened[which])
        for which in left:
            stacks[which].close()
        assert hooks_left(bridge) == []
    for context in contexts():
        with pytest.raises(KeyError), context:
            raise KeyError
        assert hooks_left(bridge) == []
    assert torch.equal(plain_logits(tiny_model()), before)


def test_every_bad_hook_and_head_is_named_at_once() -> None:
    values = torch.zeros(2, 5, 2, 4)
    patches = [
        Patch("blocks.1.attn.hook_k[2]", values),
        Patch("blocks.9.attn.hook_k", values),
        Patch("blocks.1.hook_mlp_out[0]", torch.zeros(2, 5, 16)),
    ]
    with pytest.raises(ModelError) as caught, patched(tiny_model("llama").bridge, patches):
        pass
    message = str(caught.value)
    assert "blocks.1.attn.hook_k[2]: there are heads 0 to 1 at this hook (where heads share keys" in message
    assert "this model has no hook 'blocks.9.attn.hook_k'" in message
    assert "blocks.1.hook_mlp_out[0]: holds a tensor of shape (2, 5, 16), which has no heads" in message


def test_values_of_other_prompts_and_hooks_that_never_fire_are_refused() -> None:
    bridge = tiny_model().bridge
    with pytest.raises(ModelError, match=r"values of shape \(2, 4, 16\) cannot be put where this run has \(2, 5, 16\)"):
        forward(bridge, TARGET, patches=[Patch(hook_of("mlp_out", 1), torch.zeros(2, 4, 16))])
    with pytest.raises(ModelError, match=r"where has shape \(3, 5\), the batch \(2, 5\)"):
        forward(bridge, TARGET, patches=[Patch(hook_of("mlp_out", 1), torch.zeros(2, 5, 16), torch.ones(3, 5) > 0)])
    with pytest.raises(ModelError, match="values of 6 positions, the prompts have 5"):
        forward(bridge, TARGET, patches=[Patch(hook_of("mlp_out", 1), torch.zeros(2, 6, 16))])
    with pytest.raises(ModelError, match=r"blocks\.0\.hook_mlp_in never fired"):
        forward(bridge, TARGET, patches=[Patch("blocks.0.hook_mlp_in", torch.zeros(2, 5, 16))])
    shorter = pad_prompts([[2, 9, 17, 33], [2, 21]])
    with pytest.raises(TextError, match=r"pair 0: 5 and 4 tokens\n  pair 1: 3 and 2 tokens"):
        patching_effects(bridge, source=SOURCE, target=shorter, places=[], metric=METRIC)
    with pytest.raises(TextError, match="2 prompts to take values from and 1 to put them into"):
        patching_effects(bridge, source=SOURCE, target=pad_prompts([[2]]), places=[], metric=METRIC)
    assert hooks_left(bridge) == []
