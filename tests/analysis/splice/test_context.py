"""What replaces a site's output does so exactly, is seen by everything after it, and leaves nothing behind."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.analysis.splice.replacement import (
    EVERY_POSITION,
    MeanAblated,
    Substitute,
    Transcoded,
    Unchanged,
    ZeroAblated,
    replaced,
)
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError
from tests.support.spliced_models import (
    D_HEAD,
    N_LAYERS,
    TOKENS,
    WIDTH,
    MlpItself,
    Noted,
    autoencoder_site,
    logits_with_module_hooks,
    mlp_site,
    plain_logits,
    plain_model,
    random_transcoder,
    run_with,
    tiny_model,
)

FAMILIES = ("gpt2", "llama", "gemma2")
EVERY_LAYER = [mlp_site(layer) for layer in range(N_LAYERS)]
MEAN = np.linspace(-1, 1, WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_replacement_of_all_mlps_leaves_the_logits_within_rounding(family: str) -> None:
    exact = {site: Transcoded(MlpItself(family, layer)) for layer, site in enumerate(EVERY_LAYER)}
    torch.testing.assert_close(run_with(family, exact), plain_logits(tiny_model(family)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_a_site_unchanged_changes_no_bit(family: str) -> None:
    unchanged = run_with(family, {site: Unchanged() for site in EVERY_LAYER})
    assert torch.equal(unchanged, plain_logits(tiny_model(family)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_ablations_equal_plain_hooks_on_the_mlp_modules(family: str, layers: tuple[int, ...]) -> None:
    mean = torch.from_numpy(MEAN).float()
    for substitute, value in ((ZeroAblated(), torch.zeros(WIDTH)), (MeanAblated(MEAN), mean)):
        ablated = run_with(family, {mlp_site(layer): substitute for layer in layers}, EVERY_POSITION)
        hooks = {f".{layer}.mlp": lambda *call, value=value: value.expand_as(call[2]) for layer in layers}
        torch.testing.assert_close(ablated, logits_with_module_hooks(family, hooks), rtol=1e-4, atol=1e-5)
        assert (ablated - plain_logits(tiny_model(family))).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transcoder_in_place_equals_the_module_swapped_for_it(family: str) -> None:
    transcoder = random_transcoder()
    spliced = run_with(family, {mlp_site(1): Transcoded(transcoder)}, EVERY_POSITION)
    expected = logits_with_module_hooks(family, {".1.mlp": lambda _, inputs, output: transcoder(inputs[0])})
    torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-5)


def test_the_bos_keeps_the_models_own_value_unless_every_position_is_asked_for() -> None:
    plain = plain_logits(tiny_model())
    zeroed = {mlp_site(0): ZeroAblated()}
    by_default, everywhere = run_with("gpt2", zeroed), run_with("gpt2", zeroed, EVERY_POSITION)
    assert torch.equal(by_default[:, 0], plain[:, 0])
    assert (by_default[:, 1:] - plain[:, 1:]).abs().amax((0, 2)).min() > 0.01
    assert (everywhere[:, 0] - plain[:, 0]).abs().max() > 0.01


def test_only_the_positions_asked_for_are_replaced() -> None:
    where = torch.zeros(2, 10, dtype=torch.bool)
    where[0, 4] = where[1, 7] = True

    def zero_there(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output.masked_fill(where[..., None], 0)

    masked = run_with("gpt2", {mlp_site(1): ZeroAblated()}, where)
    torch.testing.assert_close(masked, logits_with_module_hooks("gpt2", {".1.mlp": zero_there}), rtol=1e-4, atol=1e-5)
    assert torch.equal(masked[0, :4], plain_logits(tiny_model())[0, :4])  # attention looks back only


def test_later_layers_read_what_earlier_substitutes_wrote() -> None:
    noted = Noted()
    run_with("gpt2", {mlp_site(0): ZeroAblated(), mlp_site(2): noted})
    alone = Noted()
    run_with("gpt2", {mlp_site(2): alone})
    assert (noted.inputs - alone.inputs)[:, 1:].abs().max() > 0.01
    plain = plain_model("gpt2")
    zero = lambda _module, _inputs, output: output * (torch.arange(10) == 0)[None, :, None]  # noqa: E731
    plain.transformer.h[0].mlp.register_forward_hook(zero)
    seen: list[Tensor] = []
    plain.transformer.h[2].mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    plain(TOKENS)
    torch.testing.assert_close(noted.inputs, seen[0], rtol=1e-4, atol=1e-5)


def test_a_cache_taken_inside_holds_the_replaced_values() -> None:
    bridge = tiny_model().bridge
    with torch.inference_mode(), replaced(bridge, {mlp_site(1): MeanAblated(MEAN)}):
        _, cached = bridge.run_with_cache(TOKENS, use_cache=False)
        after = bridge(TOKENS, return_type="logits", use_cache=False)
    assert torch.equal(cached["blocks.1.mlp.hook_out"][1, 3], torch.from_numpy(MEAN).float())
    assert torch.equal(after, run_with("gpt2", {mlp_site(1): MeanAblated(MEAN)}))  # taking it took no hook of ours away


# ---- what each hook is for


def test_the_output_hook_is_replaced_and_the_input_hook_only_read() -> None:
    # the reference put the transcoder's output where the MLP's input belongs
    bridge = tiny_model().bridge
    site = Site("pair", "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out", WIDTH, WIDTH, "float32")
    with torch.inference_mode():
        _, plain = bridge.run_with_cache(TOKENS, use_cache=False)
        with replaced(bridge, {site: ZeroAblated()}):
            _, cached = bridge.run_with_cache(TOKENS, use_cache=False)
    for hook in ("blocks.1.ln2.hook_out", "blocks.1.mlp.hook_in"):
        assert torch.equal(cached[hook], plain[hook])
    assert not cached["blocks.1.mlp.hook_out"][:, 1:].any()


@pytest.mark.parametrize(
    "hook_in", ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized", "blocks.0.hook_resid_pre"]
)
def test_a_transcoder_gets_what_its_own_input_hook_holds(hook_in: str) -> None:
    # swapping the MLP module would hand every transcoder the normalised input, whatever it was trained on
    bridge = tiny_model().bridge
    noted = Noted()
    run_with("gpt2", {Site("pair", hook_in, "blocks.1.mlp.hook_out", WIDTH, WIDTH, "float32"): noted})
    with torch.inference_mode():
        _, cached = bridge.run_with_cache(TOKENS, use_cache=False)
    assert torch.equal(noted.inputs, cached[hook_in])
    assert torch.equal(noted.outputs, cached["blocks.1.mlp.hook_out"])


def test_an_autoencoder_reads_and_writes_the_same_hook() -> None:
    site = autoencoder_site("blocks.0.hook_resid_post")
    half = Transcoded(lambda residual: residual / 2)
    spliced = run_with("llama", {site: half}, EVERY_POSITION)
    expected = logits_with_module_hooks("llama", {"layers.0": lambda *call: halved(call[2])})
    torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-5)


def halved(output: Any) -> Any:
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def test_a_site_reading_where_another_writes_sees_what_was_written() -> None:
    noted = Noted()
    reader = Site("reader", "blocks.0.mlp.hook_out", "blocks.1.mlp.hook_out", WIDTH, WIDTH, "float32")
    run_with("gpt2", {reader: noted, mlp_site(0): MeanAblated(MEAN)})
    assert torch.equal(noted.inputs[0, 5], torch.from_numpy(MEAN).float())


# ---- nothing is left behind


def hooks_left(bridge: Any) -> list[str]:
    return [name for name, point in bridge.hook_dict.items() if point.has_hooks()]


def test_outputs_and_modules_are_the_same_afterwards() -> None:
    # the reference "restored" the block and left the transcoder in it for the rest of the process
    bridge = tiny_model().bridge
    plain = plain_logits(tiny_model())
    mlps = [block.mlp for block in bridge.blocks]
    names = [name for name, _ in bridge.named_modules()]
    with torch.inference_mode(), replaced(bridge, {site: Transcoded(random_transcoder()) for site in EVERY_LAYER}):
        assert not torch.equal(bridge(TOKENS, return_type="logits", use_cache=False), plain)
        assert [name for name, _ in bridge.named_modules()] == names
    assert all(block.mlp is mlp for block, mlp in zip(bridge.blocks, mlps, strict=True))
    assert hooks_left(bridge) == []
    assert torch.equal(plain_logits(tiny_model()), plain)


def test_outputs_are_the_same_after_an_exception_anywhere() -> None:
    bridge = tiny_model().bridge
    plain = plain_logits(tiny_model())

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_with("gpt2", {mlp_site(0): ZeroAblated(), mlp_site(1): Transcoded(fail)})
    with pytest.raises(KeyError), replaced(bridge, {mlp_site(0): ZeroAblated()}):
        raise KeyError
    assert hooks_left(bridge) == []
    assert torch.equal(plain_logits(tiny_model()), plain)


def test_nested_contexts_add_up_and_leave_one_by_one() -> None:
    bridge = tiny_model().bridge
    first: dict[Site, Substitute] = {mlp_site(0): ZeroAblated()}
    both: dict[Site, Substitute] = {**first, mlp_site(1): MeanAblated(MEAN)}
    expected_first, expected_both, plain = run_with("gpt2", first), run_with("gpt2", both), plain_logits(tiny_model())
    expected_inner = run_with("gpt2", {mlp_site(0): MeanAblated(MEAN)})
    with replaced(bridge, first):
        with replaced(bridge, {mlp_site(1): MeanAblated(MEAN)}):
            assert torch.equal(plain_logits(tiny_model()), expected_both)
        assert torch.equal(plain_logits(tiny_model()), expected_first)
        with replaced(bridge, {mlp_site(0): MeanAblated(MEAN)}):
            assert torch.equal(plain_logits(tiny_model()), expected_inner)
        assert torch.equal(plain_logits(tiny_model()), expected_first)
    assert torch.equal(plain_logits(tiny_model()), plain)


def test_contexts_left_in_another_order_than_entered_restore_everything() -> None:
    bridge = tiny_model().bridge
    plain = plain_logits(tiny_model())
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(replaced(bridge, {mlp_site(0): ZeroAblated()}))
    inner.enter_context(replaced(bridge, {mlp_site(1): ZeroAblated()}))
    outer.close()
    assert torch.equal(plain_logits(tiny_model()), run_with("gpt2", {mlp_site(1): ZeroAblated()}))
    inner.close()
    assert torch.equal(plain_logits(tiny_model()), plain)


def test_nothing_is_replaced_before_entering_and_somebody_elses_hook_survives() -> None:
    bridge = tiny_model().bridge
    plain = plain_logits(tiny_model())
    context = replaced(bridge, {mlp_site(0): ZeroAblated()})
    assert torch.equal(plain_logits(tiny_model()), plain)
    seen: list[int] = []
    point = bridge.hook_dict["blocks.0.mlp.hook_out"]
    point.add_hook(lambda value, hook: seen.append(1))
    try:
        with context:
            plain_logits(tiny_model())
        plain_logits(tiny_model())
    finally:
        point.remove_hooks()
    assert seen == [1, 1]


def test_gradients_reach_a_transcoder_in_place() -> None:
    transcoder = random_transcoder().requires_grad_(True)
    with replaced(tiny_model().bridge, {mlp_site(1): Transcoded(transcoder)}):
        logits = tiny_model().bridge(TOKENS, return_type="logits", use_cache=False)
    (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), [transcoder.W_dec])
    assert gradient.abs().sum() > 0


# ---- what cannot be replaced is refused


def test_every_problem_is_reported_at_once() -> None:
    alias = Site("alias", "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", WIDTH, WIDTH, "float32")
    substitutes: dict[Site, Substitute] = {
        mlp_site(0): ZeroAblated(),
        alias: ZeroAblated(),
        mlp_site(1): Transcoded(random_transcoder(d_in=8)),
        mlp_site(2): MeanAblated(MEAN[:-1]),
        Site("far", "blocks.0.mlp.hook_inn", "blocks.9.mlp.hook_out", WIDTH, WIDTH, "float32"): Unchanged(),
        autoencoder_site("blocks.0.attn.hook_z"): Unchanged(),
        autoencoder_site("blocks.0.attn.hook_z[1]", D_HEAD): Unchanged(),
    }
    with pytest.raises(ModelError) as caught, replaced(tiny_model().bridge, substitutes):
        pass
    message = str(caught.value)
    assert "site alias: writes to blocks.0.hook_mlp_out, which site layer0 replaces too" in message
    assert "site layer1: the transcoder has d_in 8, the site 16" in message
    assert "site layer2: the mean has shape (15,), wanted (16,)" in message
    assert "site far: this model has no hook 'blocks.0.mlp.hook_inn'; near matches: blocks.0.mlp.hook_in" in message
    assert "site far: this model has no hook 'blocks.9.mlp.hook_out'" in message
    assert (
        "site blocks.0.attn.hook_z.head1: writes to blocks.0.attn.hook_z[1], which site blocks.0.attn.hook_z" in message
    )
    assert hooks_left(tiny_model().bridge) == []


@pytest.mark.parametrize(
    ("site", "complaint"),
    [
        (Site("late", "blocks.1.mlp.hook_in", "blocks.0.mlp.hook_out", 16, 16, "float32"), "had not fired before it"),
        (
            Site("wide", "blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out", 8, 16, "float32"),
            r"wanted 8 numbers per position",
        ),
        (autoencoder_site("blocks.0.attn.hook_z[4]", D_HEAD), r"wanted .* with more than 4 heads"),
        (autoencoder_site("blocks.0.mlp.hook_out[0]"), r"wanted .* with more than 0 heads"),
        (autoencoder_site("blocks.0.hook_mlp_in"), "never fired, so nothing was replaced"),
        (autoencoder_site("embed.hook_in"), "wanted floating-point activations"),
    ],
)
def test_a_site_that_is_none_of_this_model_is_refused_when_it_is_run(site: Site, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        run_with("gpt2", {site: Unchanged()})
    assert hooks_left(tiny_model().bridge) == []


def test_a_mask_of_another_batch_and_a_substitute_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"where has shape \(3, 10\), the batch \(2, 10\)"):
        run_with("gpt2", {mlp_site(0): ZeroAblated()}, torch.ones(3, 10, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"where has shape \(2, 11\), the batch \(2, 10\)"):
        run_with("gpt2", {mlp_site(0): ZeroAblated()}, torch.ones(2, 11, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"gave torch\.float32 of shape \(2, 10, 15\), wanted .* \(2, 10, 16\)"):
        run_with("gpt2", {mlp_site(0): Transcoded(lambda inputs: inputs[..., :-1])})
