"""A hook and the name that HookedTransformer has for it hold the same vectors, in every family."""

from __future__ import annotations

import pytest
import torch

from tailrace.pipeline.formats.hooks import hooked_transformer_name, module_of
from tailrace.pipeline.model.language_model import SiteHooks, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.cache_format import Site
from tests.support.quick import quick
from tests.support.tiny_models import FAMILIES, save_tiny_model


@pytest.mark.parametrize("family", quick(FAMILIES, *list(FAMILIES)[:2]))
def test_another_name_means_the_same_vectors_and_is_given_for_the_mlp_s_output_unless_a_norm_follows(tmp_path, family):
    model = load_language_model(ModelSettings(model=str(save_tiny_model(tmp_path, family))))
    names = {hook: hooked_transformer_name(hook, model.identity()) for hook in model.bridge.hook_dict}
    renamed = {hook: name for hook, name in names.items() if name not in (None, hook)}
    assert ("blocks.1.mlp.hook_out" in renamed) == (family in ("gpt2", "neox", "llama"))
    assert {"blocks.1.hook_in", "blocks.1.hook_out", "blocks.1.mlp.out.hook_in"} <= renamed.keys()
    sites = [SiteHooks(str(number), *pair) for number, pair in enumerate(renamed.items())]
    held = model.capture(torch.randint(3, 40, (2, 12)), sites)
    for hook, name in renamed.items():
        torch.testing.assert_close(held[hook], held[name], rtol=0, atol=0)


def test_the_stream_behind_a_block_is_what_the_block_s_module_gives():
    model = {"architecture": "LlamaForCausalLM"}
    for hook in ("blocks.3.hook_resid_post", "blocks.3.hook_out"):
        assert module_of(Site("stream", hook, hook, 8, 8, "float32"), model) == "layers.3"
    before = "blocks.3.hook_resid_pre"
    assert module_of(Site("stream", before, before, 8, 8, "float32"), model) is None
