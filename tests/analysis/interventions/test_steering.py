"""Text written with features changed: nothing added is nothing changed, whatever keeps tokens or pads prompts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.generation import FeatureChange, NextTokenChange, SteeredModel, next_token_changes
from tailrace.storage.cache_format import Site
from tailrace.training.cross_layer.layers import split_layers
from tests.support.cross_layer_transcoders import random_cross_layer
from tests.support.spliced_models import N_LAYERS, TOKENS, WIDTH, mlp_site, random_transcoder, tiny_model

N_NEW = 6
PROMPTS = [TOKENS[0].tolist(), TOKENS[1, :4].tolist(), TOKENS[0, 3:10].tolist()]
ONE = [FeatureChange(mlp_site(1), (4,), "add", 6.0)]
ACROSS = [FeatureChange(mlp_site(0), (4,), "add", 40.0)]


def after_bos(tokens: Tensor) -> Tensor:
    return (torch.arange(tokens.shape[1]) > 0).expand(tuple(tokens.shape))


def coders(across: bool = False) -> dict[Site, Any]:
    sites = [mlp_site(layer) for layer in range(N_LAYERS)]
    if across:
        return dict(zip(sites, split_layers(random_cross_layer(width=WIDTH, n_layers=N_LAYERS), sites), strict=True))
    return {site: random_transcoder(seed=layer) for layer, site in enumerate(sites)}


def steered(family: str = "gpt2", *, across: bool = False, ends: tuple[int, ...] = ()) -> SteeredModel:
    return SteeredModel(tiny_model(family).bridge, coders(across), after_bos, ends)


@pytest.mark.parametrize("across", [False, True])
def test_adding_zero_leaves_every_bit_and_adding_more_does_not(across: bool) -> None:
    model, changes = steered(across=across), ACROSS if across else ONE
    nothing = [FeatureChange(one.site, one.features, "add", 0.0) for one in changes]
    nothing += [FeatureChange(mlp_site(2), (0, 1, 2), "scale", 1.0)]
    assert torch.equal(model.logits(PROMPTS, nothing), model.logits(PROMPTS))
    assert model.write(PROMPTS, N_NEW, nothing) == model.write(PROMPTS, N_NEW)
    assert not torch.allclose(model.logits(PROMPTS, changes), model.logits(PROMPTS))
    assert model.write(PROMPTS, N_NEW, changes) != model.write(PROMPTS, N_NEW)


FAMILIES = ("gpt2", "neox", "llama", "gemma2", "olmo2")
QUICK = (("gpt2", True), ("llama", False))
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(FAMILIES, (False, True))
]


@pytest.mark.parametrize(("family", "across"), CASES)
def test_the_text_needs_no_cache_and_is_that_of_each_prompt_alone(family: str, across: bool) -> None:
    model, changes = steered(family, across=across), ACROSS if across else ONE
    texts = model.write(PROMPTS, N_NEW, changes)
    assert texts == model.write(PROMPTS, N_NEW, changes, use_cache=False)
    assert texts == [model.write([prompt], N_NEW, changes)[0] for prompt in PROMPTS]
    together = model.logits(PROMPTS, changes)
    for row, prompt in enumerate(PROMPTS):
        alone = model.logits([prompt], changes)[0]
        torch.testing.assert_close(together[row, : len(prompt)], alone, rtol=1e-4, atol=1e-4)


def test_unchanged_it_is_what_the_models_own_generate_writes() -> None:
    bridge = tiny_model().bridge
    own = bridge.generate(TOKENS, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False)
    assert steered().write(TOKENS.tolist(), N_NEW) == own[:, TOKENS.shape[1] :].tolist()


def test_a_text_ends_with_its_end_and_the_others_go_on() -> None:
    texts = steered().write(PROMPTS, N_NEW, ONE)
    end = texts[1][2]
    ended = steered(ends=(end,)).write(PROMPTS, N_NEW, ONE)
    for text, cut in zip(texts, ended, strict=True):
        assert cut == (text[: text.index(end) + 1] if end in text else text)
    assert len(ended[1]) <= 3


def test_tokens_are_drawn_by_the_prompts_own_random_numbers() -> None:
    def drawn(*seeds: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return steered().write(prompts, N_NEW, ONE, temperature=1.0, rngs=rngs)

    texts = drawn(1, 2, 3)
    assert texts == drawn(1, 2, 3) != drawn(4, 5, 6)
    assert drawn(2, prompts=PROMPTS[1:2]) == texts[1:2]
    frozen = [np.random.default_rng(1) for _ in PROMPTS]
    cold = steered().write(PROMPTS, N_NEW, ONE, temperature=1e-6, rngs=frozen)
    assert cold == steered().write(PROMPTS, N_NEW, ONE)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    n_texts = 400
    prompts = [PROMPTS[1]] * n_texts
    rngs = [np.random.default_rng(row) for row in range(n_texts)]
    (counts,) = [np.bincount([text[0] for text in steered().write(prompts, 1, temperature=0.7, rngs=rngs)])]
    likely = (steered().logits(prompts[:1])[0, -1].double() / 0.7).softmax(-1).numpy()[: len(counts)]
    spread = np.sqrt(n_texts * likely * (1 - likely))
    assert (np.abs(counts - n_texts * likely) < 4.5 * spread + 1).all()


def test_a_change_at_one_position_moves_nothing_before_it() -> None:
    at_three = [FeatureChange(mlp_site(1), (4,), "add", 6.0, position=3)]
    plain, changed = (steered().logits(PROMPTS, changes) for changes in ([], at_three))
    moved = (plain - changed).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False] * 3 + [True] * (len(PROMPTS[0]) - 3)
    padded = steered().write(PROMPTS, N_NEW, at_three)
    assert padded == [steered().write([prompt], N_NEW, at_three)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("kind", "value"), [("clamp", 5.0), ("scale", 3.0), ("off", 0.0)])
def test_every_kind_of_change_adds_the_decoder_times_what_it_changes(kind: Any, value: float) -> None:
    site, coder = mlp_site(1), random_transcoder(seed=1)
    inputs = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    outputs = torch.zeros(1, 3, WIDTH)
    feature = int(coder.encode(inputs)[0, 1].argmax())
    made = steered()._substitutes([FeatureChange(site, (feature,), kind, value)], [0], 3)[site](inputs, outputs)
    before = coder.encode(inputs)[..., feature]
    after = {"clamp": torch.full_like(before, value), "scale": value * before, "off": 0 * before}[kind]
    torch.testing.assert_close(made, (after - before)[..., None] * coder.W_dec[feature])


def test_divergence_and_changed_tokens_by_hand() -> None:
    even, likely, other = [0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]
    plain = torch.tensor([[even, likely, even, likely], [even, likely, likely, even]])
    changed = torch.tensor([[other, other, even, even], [other, likely, other, other]])
    first, second = next_token_changes(plain, changed, [4, 3])
    moved = 0.75 * math.log(3) - 0.25 * math.log(3)  # 0.75 ln(0.75 / 0.25) + 0.25 ln(0.25 / 0.75)
    assert (first.n_changed, first.n_tokens) == (1, 2)  # positions 1 and 2: the BOS is left out
    assert first.kl == pytest.approx(moved, abs=1e-6)
    assert second == NextTokenChange(0.0, 0, 1)  # what stands after a text counts nothing
