"""A site of one attention head reads and writes that head's slice and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.splice.hook_points import name_problem, observed
from tailrace.analysis.splice.replacement import EVERY_POSITION, ZeroAblated
from tests.support.spliced_models import (
    D_HEAD,
    TOKENS,
    Noted,
    autoencoder_site,
    plain_logits,
    plain_model,
    run_with,
    tiny_model,
)


def zeroed_columns(head: int) -> Callable[..., Any]:
    """Return a hook on the module before the output projection's: its input with one head's columns at zero."""

    def zero(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = inputs[0].clone()
        value[..., head * D_HEAD : (head + 1) * D_HEAD] = 0
        return (value, *inputs[1:])

    return zero


@pytest.mark.parametrize(
    ("family", "projection"), [("gpt2", "h.1.attn.c_proj"), ("llama", "layers.1.self_attn.o_proj")]
)
@pytest.mark.parametrize("head", [0, 2])
def test_ablating_one_head_leaves_the_others_alone(family: str, projection: str, head: int) -> None:
    # the reference zeroed every head of the hook, and took head 0 for none
    site = autoencoder_site(f"blocks.1.attn.hook_z[{head}]", D_HEAD)
    ablated = run_with(family, {site: ZeroAblated()}, EVERY_POSITION)
    plain = plain_model(family)
    module = next(module for name, module in plain.named_modules() if name.endswith(projection))
    module.register_forward_pre_hook(zeroed_columns(head))
    with torch.inference_mode():
        torch.testing.assert_close(ablated, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert (ablated - plain_logits(tiny_model(family))).abs().max() > 0.01


def test_the_tensor_of_all_heads_is_copied_not_written_to() -> None:
    bridge = tiny_model().bridge
    hook = "blocks.1.attn.hook_z"
    site = autoencoder_site(f"{hook}[0]", D_HEAD)
    with torch.inference_mode():
        _, plain = bridge.run_with_cache(TOKENS, use_cache=False)
        with observed(bridge.hook_dict, [hook]) as before:
            run_with("gpt2", {site: ZeroAblated()})
    assert torch.equal(before[hook], plain[hook])


def test_a_head_is_read_and_written_as_its_slice_and_all_heads_side_by_side() -> None:
    bridge = tiny_model().bridge
    with torch.inference_mode():
        _, cached = bridge.run_with_cache(TOKENS, use_cache=False)
    z = cached["blocks.2.attn.hook_z"]
    one, every = Noted(), Noted()
    run_with("gpt2", {autoencoder_site("blocks.2.attn.hook_z[3]", D_HEAD): one})
    run_with("gpt2", {autoencoder_site("blocks.2.attn.hook_z"): every})
    assert torch.equal(one.inputs, z[:, :, 3])
    assert torch.equal(every.inputs, z.flatten(2))
    two = {autoencoder_site(f"blocks.2.attn.hook_z[{head}]", D_HEAD): ZeroAblated() for head in range(4)}
    whole = {autoencoder_site("blocks.2.attn.hook_z"): ZeroAblated()}
    assert torch.equal(run_with("gpt2", two), run_with("gpt2", whole))


@pytest.mark.parametrize("index", ["-1", "", "x"])
def test_a_name_with_a_bad_index_is_no_hook_and_is_answered_with_the_one_meant(index: str) -> None:
    points = {"blocks.0.attn.hook_z": None}
    assert name_problem("blocks.0.attn.hook_z[0]", points) is None
    assert name_problem(f"blocks.0.attn.hook_z[{index}]", points) == (
        f"this model has no hook 'blocks.0.attn.hook_z[{index}]'; near matches: blocks.0.attn.hook_z"
    )
