"""Layers and hook names become sites; everything wrong with a request is said at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tailrace.pipeline.model.sites import SiteHooks, layer_site, resolve_sites
from tailrace.storage.errors import ModelError

N_LAYERS = 12
PARTS = ("hook_resid_pre", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out")
HOOKS = [f"blocks.{layer}.{part}" for layer in range(N_LAYERS) for part in PARTS]


def resolve(layers: str | None = None, *hooks: str) -> list[SiteHooks]:
    return resolve_sites(layers, hooks, n_layers=N_LAYERS, hook_names=HOOKS, count_heads=count_heads)


def count_heads(hooks: Sequence[str]) -> dict[str, int]:
    """Stand in for a model of four heads, of which one hook in five never fires."""
    return {hook: 4 if hook.endswith("hook_z") else 0 for hook in hooks if not hook.endswith("hook_normalized")}


def refusal(layers: str | None = None, *hooks: str) -> list[str]:
    """Return the problems, one a line, that a request is refused with."""
    with pytest.raises(ModelError) as caught:
        resolve(layers, *hooks)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_numbers_and_ranges_of_layers_keep_their_order() -> None:
    assert [site.name for site in resolve(" 3, 0,8 - 10")] == ["layer3", "layer0", "layer8", "layer9", "layer10"]


def test_all_means_every_layer() -> None:
    assert resolve("all") == [layer_site(layer) for layer in range(12)]


def test_a_layer_is_the_input_and_the_output_of_its_mlp() -> None:
    assert resolve("8") == [SiteHooks("layer8", "blocks.8.mlp.hook_in", "blocks.8.mlp.hook_out")]


@pytest.mark.parametrize(
    ("text", "site"),
    [
        (
            "old=blocks.8.ln2.hook_normalized:blocks.8.hook_mlp_out",
            SiteHooks("old", "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"),
        ),
        (
            "blocks.0.hook_resid_pre:blocks.1.hook_mlp_out",
            SiteHooks(
                "blocks.0.hook_resid_pre-to-blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"
            ),
        ),
        ("blocks.2.attn.hook_z", SiteHooks("blocks.2.attn.hook_z", "blocks.2.attn.hook_z", "blocks.2.attn.hook_z")),
        ("z=blocks.2.attn.hook_z", SiteHooks("z", "blocks.2.attn.hook_z", "blocks.2.attn.hook_z")),
        (
            "blocks.2.attn.hook_z[0]",
            SiteHooks("blocks.2.attn.hook_z.head0", "blocks.2.attn.hook_z[0]", "blocks.2.attn.hook_z[0]"),
        ),
        ("z=blocks.2.attn.hook_z [ 03 ]", SiteHooks("z", "blocks.2.attn.hook_z[3]", "blocks.2.attn.hook_z[3]")),
        (
            "blocks.2.attn.hook_z[3]:blocks.2.hook_mlp_out",
            SiteHooks(
                "blocks.2.attn.hook_z.head3-to-blocks.2.hook_mlp_out",
                "blocks.2.attn.hook_z[3]",
                "blocks.2.hook_mlp_out",
            ),
        ),
        ("blocks.5.mlp.hook_in:blocks.5.mlp.hook_out", layer_site(5)),
    ],
)
def test_hooks_are_given_as_a_pair_or_as_one_with_or_without_a_name(text: str, site: SiteHooks) -> None:
    assert resolve(None, text) == [site]


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        (SiteHooks("mine", "blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out"), 5),
        (SiteHooks("layer5", "blocks.5.mlp.hook_in", "blocks.6.mlp.hook_out"), None),
        (SiteHooks("layer5", "blocks.5.mlp.hook_out", "blocks.5.mlp.hook_out"), None),
        (SiteHooks("layer5", "blocks.5.ln2.hook_normalized", "blocks.5.mlp.hook_out"), None),
    ],
)
def test_only_an_mlps_own_input_and_output_make_a_default_site(site: SiteHooks, layer: int | None) -> None:
    assert site.default_layer == layer


def test_every_problem_is_reported_at_once() -> None:
    problems = refusal("12,5-3,eight,2,2", "a/b=blocks.0.mlp.hook_out", "a:b:c", "blocks.0.mlp.hook_outt")
    assert problems == [
        "7 problems in the sites asked for:",
        "layers '12': this model has 12 layers, 0 to 11",
        "layers '5-3': the range runs backwards; write 3-5",
        "layers 'eight': write numbers and ranges such as 0,3,8-11, or all",
        "hooks 'a/b=blocks.0.mlp.hook_out': the name 'a/b' will be a folder name; use up to 128 letters, digits, '.', "
        "'_' or '-', beginning with a letter or digit",
        "hooks 'a:b:c': write IN_HOOK:OUT_HOOK, one HOOK, or NAME=IN_HOOK:OUT_HOOK",
        "site blocks.0.mlp.hook_outt: this model has no hook 'blocks.0.mlp.hook_outt'; near matches: "
        "blocks.0.mlp.hook_out, blocks.10.mlp.hook_out, blocks.9.mlp.hook_out, blocks.8.mlp.hook_out",
        "site layer2: two sites have this name; leave one out, or name it: NAME=IN:OUT",
    ]


def test_names_that_differ_only_in_case_are_one_folder_somewhere() -> None:
    assert "two sites have this name" in refusal(None, "Z=blocks.0.attn.hook_z", "z=blocks.1.attn.hook_z")[1]


def test_the_same_hooks_under_two_names_are_refused() -> None:
    assert refusal("4", "mine=blocks.4.mlp.hook_in:blocks.4.mlp.hook_out")[1] == (
        "site mine: has the same hooks as site layer4; leave one out"
    )


@pytest.mark.parametrize(
    ("hook", "complaint"),
    [
        ("blocks.2.attn.hook_z[4]", "this hook has 4 heads, 0 to 3"),
        ("blocks.2.attn.hook_z[-1]", "this hook has 4 heads, 0 to 3"),
        (
            "blocks.2.mlp.hook_in[0]",
            "this hook has no heads, it holds one vector per position; leave out [0]. Heads are at "
            "blocks.L.attn.hook_z, hook_q, hook_k and hook_v",
        ),
    ],
)
def test_a_head_that_a_hook_does_not_have_is_answered_with_those_it_has(hook: str, complaint: str) -> None:
    assert refusal(None, f"mine={hook}", f"other={hook}:blocks.3.hook_resid_pre") == [
        "2 problems in the sites asked for:",
        f"site mine: {hook}: {complaint}",
        f"site other: {hook}: {complaint}",
    ]


@pytest.mark.parametrize("hook", ["a[", "a[b]", "a[]", "a[0-3]", "a[1][2]", "[1]", "a[1]b", "a[1.5]"])
def test_brackets_that_hold_no_head_are_explained(hook: str) -> None:
    assert refusal(None, hook)[1] == (
        f"hooks '{hook}': '{hook}' is not understood; brackets hold the number of one head, such as "
        "blocks.0.attn.hook_z[5]"
    )


def test_an_unknown_hook_with_a_head_is_answered_with_near_matches_without() -> None:
    (_, problem) = refusal(None, "blocks.2.attn.hook_zz[1]")
    assert problem.startswith("site blocks.2.attn.hook_zz.head1: this model has no hook 'blocks.2.attn.hook_zz'; near")
    assert "blocks.2.attn.hook_z," in problem


def test_heads_are_left_to_the_capture_where_they_cannot_be_counted() -> None:
    assert len(resolve(None, "blocks.2.ln2.hook_normalized[9]")) == 1


def test_heads_of_one_hook_are_sites_of_their_own_and_the_same_head_twice_is_refused() -> None:
    heads = [f"blocks.2.attn.hook_z[{head}]" for head in range(4)]
    assert [site.hook_in for site in resolve(None, *heads)] == heads
    assert refusal(None, "a=blocks.2.attn.hook_z[1]", "b=blocks.2.attn.hook_z[01]")[1] == (
        "site b: has the same hooks as site a; leave one out"
    )


@pytest.mark.parametrize("layers", [None, "", " , "])
def test_no_site_at_all_says_which_layers_there_are(layers: str | None) -> None:
    assert "layers 0 to 11" in refusal(layers)[1]
