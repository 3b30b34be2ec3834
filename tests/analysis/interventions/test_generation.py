"""Text generated with a splice in place is the same whether a key-value cache keeps earlier tokens or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.features import (
    Ablate,
    Add,
    Clamp,
    Edit,
    EditedFeatures,
    EditedNeurons,
    KeepOnly,
    Scale,
)
from tailrace.analysis.interventions.patching import Patch, patched
from tailrace.analysis.splice.hook_points import hooked, observed
from tailrace.analysis.splice.in_place import InPlaceSums, Measured
from tailrace.analysis.splice.replacement import (
    EVERY_POSITION,
    MeanAblated,
    Substitute,
    Transcoded,
    ZeroAblated,
    replaced,
)
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError
from tailrace.training.cross_layer.layers import StackedLayer, split_layers
from tests.support.cross_layer_transcoders import random_cross_layer
from tests.support.paths import ROOT
from tests.support.quick import quick
from tests.support.spliced_models import (
    D_HEAD,
    N_LAYERS,
    TOKENS,
    WIDTH,
    autoencoder_site,
    mlp_site,
    plain_logits,
    random_transcoder,
    tiny_model,
)

N_NEW = 12
PROMPT, LENGTH = TOKENS, 10
TEXT = LENGTH + N_NEW
FAMILIES = ("neox", "llama", "gemma2", "olmo2")  # and GPT-2, of which each kind of splice is tested


def generated(bridge: Any, *, cache: bool, prompt: Tensor = PROMPT, **options: Any) -> list[list[int]]:
    """Return the new tokens, greedily chosen."""
    text = bridge.generate(
        prompt, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache, verbose=False,
        **options,
    )  # fmt: skip
    return text[:, prompt.shape[1] :].tolist()


def both_ways(bridge: Any, prompt: Tensor = PROMPT, tolerance: float = 1e-4) -> list[list[int]]:
    """Return the new tokens after checking that they, and all logits they are chosen by, need no cache."""
    texts, logits = [], []
    for cache in (True, False):
        seen: list[Tensor] = []
        note = lambda value, *, hook, seen=seen: seen.append(value[:, -1])  # noqa: E731
        with hooked([(bridge.hook_dict["unembed.hook_out"], note)]):
            texts.append(generated(bridge, cache=cache, prompt=prompt))
        logits.append(torch.stack(seen))
    torch.testing.assert_close(logits[0], logits[1], rtol=tolerance, atol=tolerance)
    assert texts[0] == texts[1]
    return texts[0]


@functools.cache
def plain_text(bridge: Any, prompt: Tensor = PROMPT) -> list[list[int]]:
    return generated(bridge, cache=True, prompt=prompt)


def columns(*chosen: int, length: int = TEXT) -> Tensor:
    """Return a mask (1, length) of these columns."""
    return torch.isin(torch.arange(length), torch.tensor(chosen))[None]


def edited(*edits: Edit, **options: Any) -> dict[Site, Substitute]:
    return {mlp_site(1): EditedFeatures(random_transcoder(), edits, **options)}


def across_layers() -> dict[Site, Substitute]:
    return {site: Transcoded(layer) for site, layer in stacked().items()}


def stacked() -> dict[Site, StackedLayer]:
    sites = [mlp_site(layer) for layer in range(N_LAYERS)]
    return dict(zip(sites, split_layers(random_cross_layer(width=WIDTH, n_layers=N_LAYERS), sites), strict=True))


def edited_across(edit: Edit, **options: Any) -> dict[Site, Substitute]:
    """Return all layers of a cross-layer transcoder, the middle one edited."""
    edits = {mlp_site(1): [edit]}
    return {site: EditedFeatures(layer, edits.get(site, []), **options) for site, layer in stacked().items()}


def measured() -> dict[Site, Substitute]:
    where = torch.ones(2, TEXT, dtype=torch.bool)
    where[:, 0] = False
    return {site: Measured(layer, InPlaceSums(), where) for site, layer in stacked().items()}


SPLICES: dict[str, Callable[[], dict[Site, Substitute]]] = {
    "a transcoder": lambda: {mlp_site(1): Transcoded(random_transcoder())},
    "one with a skip path": lambda: {mlp_site(1): Transcoded(random_transcoder(skip=True))},
    "all layers": lambda: {mlp_site(one): Transcoded(random_transcoder(seed=one)) for one in range(N_LAYERS)},
    "an autoencoder": lambda: {autoencoder_site("blocks.1.hook_resid_post"): Transcoded(random_transcoder())},
    "one across layers": across_layers,
    "one across layers, measured": measured,
    "one across layers, ablated": lambda: edited_across(Ablate(tuple(range(12)))),
    "one across layers, steered at one": lambda: {
        mlp_site(0): EditedFeatures(stacked()[mlp_site(0)], [Clamp((4,), 6.0)], on_top_of="model")
    },
    "nothing": lambda: {mlp_site(1): ZeroAblated()},
    "the mean": lambda: {mlp_site(1): MeanAblated(np.linspace(-1, 1, WIDTH))},
    "a head's": lambda: {autoencoder_site("blocks.1.attn.hook_z[2]", D_HEAD): MeanAblated(np.full(D_HEAD, 2.0))},
    "keys": lambda: {autoencoder_site("blocks.1.attn.hook_k[1]", D_HEAD): Transcoded(lambda keys: 3 * keys)},
    "values": lambda: {autoencoder_site("blocks.1.attn.hook_v[1]", D_HEAD): Transcoded(lambda values: -2 * values)},
    "ablated features": lambda: edited(Ablate(tuple(range(12)))),
    "kept features": lambda: edited(KeepOnly((3, 5))),
    "a clamped feature": lambda: edited(Clamp((4,), 6.0), on_top_of="model"),
    "an added feature": lambda: edited(Add((4,), 6.0), on_top_of="model"),
    "scaled features": lambda: edited(Scale(tuple(range(24)), -2.0), on_top_of="model"),
    "clamped in the prompt": lambda: edited(Clamp((4,), 6.0, where=columns(*range(3, LENGTH))), on_top_of="model"),
    "clamped in what is new": lambda: edited(Clamp((4,), 6.0, where=columns(*range(LENGTH, TEXT))), on_top_of="model"),
    "neurons": lambda: {
        autoencoder_site("blocks.1.mlp.hook_post", 4 * WIDTH): EditedNeurons([Clamp(tuple(range(9)), 2.0)])
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", quick(SPLICES, *list(SPLICES)[::3]))
def test_a_splice_gives_the_same_text_with_and_without_a_cache(kind: str) -> None:
    bridge = tiny_model().bridge
    with replaced(bridge, SPLICES[kind]()):
        text = both_ways(bridge)
    assert text != plain_text(bridge)  # the splice counts


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_so_in_every_family_and_by_the_models_own_generate(family: str) -> None:
    bridge = tiny_model(family).bridge
    with replaced(bridge, SPLICES["all layers"]()):
        text = both_ways(bridge)
        own = bridge.original_model.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None)
    assert text == own[:, LENGTH:].tolist() != plain_text(bridge)


@functools.cache
def real_model(folder: Path) -> tuple[Any, Tensor]:
    """Return the bridge of a trained language model and two prompts."""
    model = load_language_model(ModelSettings(model=str(folder), model_dtype="float32"))
    texts = [
        "The people of the United States have a great interest",
        "We must not forget that the debt of this country",
    ]
    ids = torch.tensor([[model.bos_token_id, *ids][:LENGTH] for ids in model.tokenize(texts)])
    return model.bridge, ids


@pytest.mark.parametrize(
    "hook", quick(["hook_k", "hook_v[1]", "hook_z", "hook_pattern", "hook_attn_scores"], "hook_v[1]", "hook_pattern")
)
def test_a_patch_in_the_prompt_gives_the_same_text_with_and_without_a_cache(hook: str) -> None:
    bridge, prompts = real_model(bundled_model("tiny-lm"))
    point = HookName.parse(f"blocks.1.attn.{hook}").point
    with torch.inference_mode(), observed(bridge.hook_dict, [point]) as seen:
        bridge(prompts.flip(0), return_type=None, use_cache=False)
    with patched(bridge, [Patch(f"blocks.1.attn.{hook}", seen[point], columns(*range(1, LENGTH)))]):
        text = both_ways(bridge, prompts)
    assert text != plain_text(bridge, prompts)


def splices_of(bridge: Any) -> dict[str, dict[Site, Substitute]]:
    """Return one of each sort in the middle of a model."""
    cfg, layer = bridge.cfg, bridge.cfg.n_layers // 2
    width, d_head = cfg.d_model, cfg.d_model // cfg.n_heads
    mlp = Site("mlp", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out", width, width, "float32")
    z = autoencoder_site(f"blocks.{layer}.attn.hook_z[1]", d_head)
    coder = random_transcoder(width, width, d_sae=256, k=32, skip=True)
    return {
        "transcoder": {mlp: Transcoded(coder)},
        "zero": {mlp: ZeroAblated()},
        "head": {z: MeanAblated(np.full(d_head, 8.0))},
        "clamped": {mlp: EditedFeatures(coder, [Clamp((7,), 60.0)], on_top_of="model")},
        "kept": {mlp: EditedFeatures(coder, [KeepOnly((7, 8))])},
    }


def smollm2() -> Path:
    return fetch_smollm2(ROOT / "demo" / "smollm2-135m")


@pytest.mark.parametrize("folder", [lambda: bundled_model("tiny-lm"), pytest.param(smollm2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_trained_models_say_the_same_with_and_without_a_cache(folder: Callable[[], Path]) -> None:
    bridge, prompts = real_model(folder())
    plain = plain_text(bridge, prompts)
    for name, substitutes in splices_of(bridge).items():
        with replaced(bridge, substitutes):
            text = both_ways(bridge, prompts, tolerance=1e-3)
        assert all(own != other for own, other in zip(text, plain, strict=True)), name


@pytest.mark.parametrize("where", [None, columns(2, 6, 7, length=LENGTH), EVERY_POSITION])
@pytest.mark.parametrize("sizes", [(4, 5, 1), (1, 1, 8)])
def test_a_prompt_run_in_parts_is_the_prompt_run_at_once(where: Tensor | None, sizes: tuple[int, ...]) -> None:
    bridge = tiny_model("llama").bridge
    with torch.inference_mode():
        _, seen = bridge.run_with_cache(TOKENS.flip(0), use_cache=False)
    patches = [
        Patch("blocks.2.attn.hook_pattern[1]", seen["blocks.2.attn.hook_pattern"], where),
        Patch("blocks.1.attn.hook_v[1]", seen["blocks.1.attn.hook_v"], where),
    ]
    with torch.inference_mode(), replaced(bridge, SPLICES["all layers"](), where=where), patched(bridge, patches):
        whole, cache, parts = plain_logits(tiny_model("llama")), None, []
        for part in PROMPT.split(sizes, dim=1):
            logits, cache = bridge(part, return_type="logits_and_cache", past_key_values=cache, use_cache=True)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert (whole - plain_logits(tiny_model("llama"))).abs().max() > 0.01


def test_each_generation_begins_anew_even_after_one_that_was_broken_off() -> None:
    bridge = tiny_model().bridge
    with replaced(bridge, SPLICES["a transcoder"]()):
        first = generated(bridge, cache=True)
        stream = bridge.generate_stream(PROMPT, max_new_tokens=5, do_sample=False, verbose=False)
        next(stream), stream.close()
        assert generated(bridge, cache=True) == first
        assert torch.equal(plain_logits(tiny_model()), spliced_in_one_pass())


def spliced_in_one_pass() -> Tensor:
    with replaced(tiny_model().bridge, SPLICES["a transcoder"]()):
        return plain_logits(tiny_model())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [True, False])
def test_prompts_padded_on_the_left_get_the_text_they_get_alone(family: str, cache: bool) -> None:
    bridge = tiny_model(family).bridge
    padded = PROMPT.clone()
    padded[1, :4] = 0
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    with replaced(bridge, SPLICES["all layers"]()):
        together = generated(bridge, cache=cache, prompt=padded, attention_mask=mask)
        alone = [generated(bridge, cache=cache, prompt=prompt)[0] for prompt in (PROMPT[:1], PROMPT[1:, 4:])]
    assert together == alone
    assert together != generated(bridge, cache=cache, prompt=padded, attention_mask=mask)


@pytest.mark.parametrize("cache", [True, False])
def test_text_that_grows_beyond_a_mask_or_values_is_refused(cache: bool) -> None:
    bridge = tiny_model().bridge
    of_prompt = columns(*range(1, LENGTH), length=LENGTH)
    complaint = r"layer1: where has shape \(1, 10\), the batch \(2, 11\) .* with the new tokens too where text is gener"
    with replaced(bridge, SPLICES["nothing"](), where=of_prompt), pytest.raises(ModelError, match=complaint):
        generated(bridge, cache=cache)
    steered = edited(Clamp((4,), 6.0, where=of_prompt))
    with replaced(bridge, steered), pytest.raises(ModelError, match=r"Clamp: where has shape \(1, 10\), the batch"):
        generated(bridge, cache=cache)
    patch = Patch("blocks.1.mlp.hook_out", torch.zeros(2, LENGTH, WIDTH))
    complaint = r"values of shape \(2, 10, 16\) cannot be put where this run has \(2, 11, 16\).* give `where`, as long"
    with patched(bridge, [patch]), pytest.raises(ModelError, match=complaint):
        generated(bridge, cache=cache)
    assert not bridge.original_model._forward_pre_hooks, "nothing is left behind"


def test_a_mask_that_hides_where_sequences_begin_is_refused() -> None:
    bridge = tiny_model().bridge
    causal = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    with replaced(bridge, SPLICES["nothing"]()), pytest.raises(ModelError, match="does not tell where each sequence"):
        bridge(PROMPT, attention_mask=causal, use_cache=False)
    with replaced(bridge, SPLICES["nothing"](), where=EVERY_POSITION):
        bridge(PROMPT, attention_mask=causal, use_cache=False)
