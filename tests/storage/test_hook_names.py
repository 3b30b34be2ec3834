"""A hook's name means a hook point, or one head of it, and is written as it was read."""

from __future__ import annotations

import pytest

from tailrace.storage.cache_format import HookName


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.0.attn.hook_z[0]", HookName("blocks.0.attn.hook_z", 0)),
        ("blocks.0.attn.hook_z[11]", HookName("blocks.0.attn.hook_z", 11)),
        ("blocks.0.attn.hook_z [ 3 ]", HookName("blocks.0.attn.hook_z", 3)),
        ("blocks.0.mlp.hook_in", HookName("blocks.0.mlp.hook_in", None)),
        ("blocks.0.attn.hook_z[-1]", HookName("blocks.0.attn.hook_z", -1)),
    ],
)
def test_head_zero_is_a_head_and_no_brackets_mean_the_whole_point(name: str, hook: HookName) -> None:
    assert HookName.parse(name) == hook
    assert HookName.parse(str(hook)) == hook


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z[]", "blocks.0.attn.hook_z[x]", "[3]", "a[1][2]", "a[1]b"])
def test_a_malformed_name_stays_whole_so_that_no_model_has_it(name: str) -> None:
    assert HookName.parse(name) == HookName(name, None)
    assert str(HookName.parse(name)) == name
