"""What is captured is what the model's MLPs see and say, on every family, and nothing later is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.errors import ModelError, OutOfMemoryError
from tests.support.tiny_models import FAMILIES, save_tiny_model

N_LAYERS = 3
TOKENS = torch.arange(2 * 10).view(2, 10) % 70 + 2  # two contexts of ten positions


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param, n_layers=N_LAYERS)
    return load_language_model(ModelSettings(model=str(folder)))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "gpt2", n_layers=N_LAYERS)
    return load_language_model(ModelSettings(model=str(folder)))


def plain_mlps(folder: str) -> tuple[Any, list[Any]]:
    """Return the model as transformers loads it, without TransformerLens, and the MLP of every layer."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model, [module for name, module in model.named_modules() if name.endswith(".mlp")]


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """Count the calls of a module."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_captured_pairs_are_the_inputs_and_outputs_of_the_mlp_modules(model: LanguageModel) -> None:
    plain, mlps = plain_mlps(model.bridge.cfg.model_name)
    expected: dict[str, torch.Tensor] = {}
    for layer, mlp in enumerate(mlps):

        def keep(_module: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            expected[f"blocks.{layer}.mlp.hook_in"] = inputs[0].clone()
            expected[f"blocks.{layer}.mlp.hook_out"] = output.clone()

        mlp.register_forward_hook(keep)
    with torch.no_grad():
        plain(TOKENS)
    captured = model.capture(TOKENS, model.resolve_sites("all"))
    assert len(expected) == 2 * N_LAYERS
    assert sorted(captured) == sorted(expected)
    for hook, value in expected.items():
        # TransformerLens splits GPT-2's joint query-key-value product, which rounds differently.
        torch.testing.assert_close(captured[hook], value, rtol=1e-4, atol=1e-5)


def test_every_activation_equals_that_of_run_with_cache(model: LanguageModel) -> None:
    wanted = ("resid_pre", "resid_post", "attn.hook_z", "attn.hook_out", "ln1.hook_normalized", "mlp.hook_out")
    names = [hook for hook in model.bridge.hook_dict if hook.endswith(wanted)]
    with torch.inference_mode():
        # With a KV cache attention multiplies values laid out in another way, and some processors round otherwise.
        _, cached = model.bridge.run_with_cache(TOKENS, names_filter=names, return_type=None, use_cache=False)
    captured = model.capture(TOKENS, model.resolve_sites(None, names))
    assert len(captured) >= 4 * N_LAYERS
    for hook, value in captured.items():
        assert torch.equal(value, cached[hook].flatten(2)), hook


def test_a_heads_slice_is_that_heads_part_of_what_the_attention_multiplies(model: LanguageModel) -> None:
    plain, _ = plain_mlps(model.bridge.cfg.model_name)
    projections = ("attn.c_proj", "attention.dense", "self_attn.o_proj")
    outputs = [module for name, module in plain.named_modules() if name.endswith(projections)]
    expected: dict[int, torch.Tensor] = {}
    for layer, module in enumerate(outputs):

        def keep(_module: Any, inputs: Any, layer: int = layer) -> None:
            expected[layer] = inputs[0].clone()

        module.register_forward_pre_hook(keep)
    with torch.no_grad():
        plain(TOKENS)
    assert len(expected) == N_LAYERS
    heads = [f"blocks.{layer}.attn.hook_z[{head}]" for layer in range(N_LAYERS) for head in range(4)]
    captured = model.capture(TOKENS, model.resolve_sites(None, heads))
    assert list(captured) == heads
    for layer, value in expected.items():
        for head in range(4):
            slice_ = captured[f"blocks.{layer}.attn.hook_z[{head}]"]
            torch.testing.assert_close(slice_, value[..., 4 * head : 4 * head + 4], rtol=1e-4, atol=1e-5)


def test_heads_of_one_hook_are_views_of_what_it_held_in_one_pass(model: LanguageModel) -> None:
    z = "blocks.1.attn.hook_z"
    sites = model.resolve_sites(None, [f"{z}[0]", f"{z}[3]", z, f"{z}[3]:blocks.1.hook_attn_out"])
    captured = model.capture(TOKENS, sites)
    assert list(captured) == [f"{z}[0]", f"{z}[3]", z, "blocks.1.hook_attn_out"]
    assert captured[z].shape == (2, 10, 16)
    for head in (0, 3):
        assert captured[f"{z}[{head}]"].shape == (2, 10, 4)
        assert torch.equal(captured[f"{z}[{head}]"], captured[z][..., 4 * head : 4 * head + 4])
    assert len({value.untyped_storage().data_ptr() for hook, value in captured.items() if z in hook}) == 1
    assert model.widths(sites[:1] + sites[3:]) == {
        f"{z}.head0": (4, 4),
        f"{z}.head3-to-blocks.1.hook_attn_out": (4, 16),
    }


def test_keys_and_values_have_as_many_heads_as_the_model_gives_them(model: LanguageModel) -> None:
    n_shared = 4 if model.bridge.cfg.model_name.endswith(("gpt2", "neox")) else 2
    for hook, n_heads in (("hook_q", 4), ("hook_z", 4), ("hook_k", n_shared), ("hook_v", n_shared)):
        last = f"blocks.0.attn.{hook}[{n_heads - 1}]"
        assert model.capture(TOKENS, model.resolve_sites(None, [last]))[last].shape == (2, 10, 4)
        with pytest.raises(
            ModelError, match=rf"{hook}\[{n_heads}\]: this hook has {n_heads} heads, 0 to {n_heads - 1}"
        ):
            model.resolve_sites(None, [f"blocks.0.attn.{hook}[{n_heads}]"])


def test_pairing_is_not_applicable_to_residuals_attention_and_heads(gpt2: LanguageModel) -> None:
    hooks = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "attn.hook_z", "attn.hook_z[0]"]
    for site in gpt2.resolve_sites(None, [f"blocks.1.{hook}" for hook in hooks]):
        assert not gpt2.check_pairing(TOKENS, site).applicable, site


def test_a_head_where_there_is_none_is_refused_by_the_capture_too(gpt2: LanguageModel) -> None:
    for hook, complaint in (("mlp.hook_out[0]", "this hook has no heads"), ("attn.hook_z[-1]", "4 heads, 0 to 3")):
        name = f"blocks.0.{hook}"
        with pytest.raises(ModelError, match=complaint):
            gpt2.capture(TOKENS, [SiteHooks("mine", name, name)])


@pytest.mark.parametrize(
    ("hook", "complaint"),
    [
        ("blocks.0.hook_mlp_in[0]", r"never fired: blocks\.0\.hook_mlp_in\. "),
        ("blocks.0.attn.hook_pattern[0]", r"hook blocks\.0\.attn\.hook_pattern: holds a tensor of shape"),
    ],
)
def test_a_head_of_a_hook_that_holds_no_rows_is_refused_for_that(
    gpt2: LanguageModel, hook: str, complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint):
        gpt2.widths(gpt2.resolve_sites(None, [hook]))


def test_the_output_is_the_mlp_of_the_input_bit_for_bit(model: LanguageModel) -> None:
    for site in model.resolve_sites("all"):
        check = model.check_pairing(TOKENS, site)
        assert (check.applicable, check.exact, check.max_abs_difference) == (True, True, 0.0)


def test_a_pair_shifted_by_one_row_is_flagged(model: LanguageModel) -> None:
    (site,) = model.resolve_sites("1")
    captured = model.capture(TOKENS, [site])
    inputs, outputs = captured[site.hook_in], captured[site.hook_out]
    shifted = model.compare_pair(site, inputs, outputs.roll(1, dims=1))
    assert not shifted.exact
    assert shifted.relative_error > 0.1
    flat = model.compare_pair(site, inputs.flatten(0, 1), outputs.flatten(0, 1))
    assert flat.relative_error < 1e-6


def test_pairing_cannot_be_checked_where_no_module_joins_the_hooks(gpt2: LanguageModel) -> None:
    (site,) = gpt2.resolve_sites(None, ["blocks.0.mlp.hook_in:blocks.1.mlp.hook_out"])
    assert not gpt2.check_pairing(TOKENS, site).applicable


def test_layers_after_the_last_one_wanted_never_run(model: LanguageModel) -> None:
    with counted(model.bridge.blocks[1]) as needed, counted(model.bridge.blocks[2]) as later:
        model.capture(TOKENS, model.resolve_sites("1,0"))
    assert (len(needed), len(later)) == (1, 0)


def test_capturing_the_last_layer_computes_no_logits(model: LanguageModel) -> None:
    with counted(model.bridge.unembed) as unembedded:
        model.capture(TOKENS, model.resolve_sites("2"))
    assert unembedded == []


def test_hooks_after_the_blocks_can_be_captured(gpt2: LanguageModel) -> None:
    sites = gpt2.resolve_sites("0", ["ln_final.hook_out"])
    assert gpt2.capture(TOKENS, sites)["ln_final.hook_out"].shape == (2, 10, 16)


def test_no_hook_is_left_behind_even_after_a_failure(gpt2: LanguageModel) -> None:
    gpt2.capture(TOKENS, gpt2.resolve_sites("all"))
    with pytest.raises(ModelError):
        gpt2.capture(TOKENS, gpt2.resolve_sites(None, ["blocks.0.hook_mlp_in"]))
    assert not any(point.has_hooks() for point in gpt2.bridge.hook_dict.values())


def test_somebody_elses_hook_survives_a_capture(gpt2: LanguageModel) -> None:
    seen: list[int] = []
    point = gpt2.bridge.hook_dict["blocks.0.mlp.hook_in"]
    point.add_hook(lambda value, hook: seen.append(1))
    try:
        gpt2.capture(TOKENS, gpt2.resolve_sites("0"))
        gpt2.capture(TOKENS, gpt2.resolve_sites("0"))
    finally:
        point.remove_hooks()
    assert seen == [1, 1]


def test_heads_are_flattened_and_widths_measured(gpt2: LanguageModel) -> None:
    sites = gpt2.resolve_sites("1", ["z=blocks.0.attn.hook_z", "x=blocks.0.hook_resid_pre:blocks.0.mlp.in.hook_out"])
    assert gpt2.widths(sites) == {"layer1": (16, 16), "z": (16, 16), "x": (16, 64)}


def test_a_hook_that_never_fires_is_refused_with_what_to_use(gpt2: LanguageModel) -> None:
    sites = gpt2.resolve_sites("0", ["blocks.0.hook_mlp_in"])
    with pytest.raises(ModelError, match=r"never fired: blocks\.0\.hook_mlp_in\..*blocks\.L\.mlp\.hook_in"):
        gpt2.capture(TOKENS, sites)


@pytest.mark.parametrize(
    ("hook", "complaint"),
    [
        ("blocks.0.attn.hook_pattern", r"shape \(2, 4, 10, 10\) for 2 contexts of 10 positions"),
        ("embed.hook_in", r"holds torch\.int64, wanted floating-point"),
    ],
)
def test_a_hook_that_holds_no_rows_is_refused(gpt2: LanguageModel, hook: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        gpt2.capture(TOKENS, gpt2.resolve_sites(None, [hook]))


def test_tokens_of_another_tokenizer_are_refused(gpt2: LanguageModel) -> None:
    sites = gpt2.resolve_sites("0")
    with pytest.raises(ModelError, match=r"from 3 to 80, but .* knows 0 to 79"):
        gpt2.capture(torch.tensor([[3, 80]]), sites)
    with pytest.raises(ModelError, match=r"at most 64 positions"):
        gpt2.capture(torch.zeros(1, 65, dtype=torch.int64), sites)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_names_the_batch_to_try(gpt2: LanguageModel, error: Exception, is_memory: bool) -> None:
    def fail(*_: Any) -> None:
        raise error

    handle = gpt2.bridge.blocks[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(OutOfMemoryError if is_memory else RuntimeError) as caught:
            gpt2.capture(TOKENS.repeat(8, 1), gpt2.resolve_sites("0"))
    finally:
        handle.remove()
    wanted = "the language model ran out of memory on a batch of 16 contexts; try a batch of 8"
    assert str(caught.value) == (wanted if is_memory else str(error))


def test_compiling_touches_the_mlps_and_keeps_the_hooks_around_them(
    gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def stand_in(function: Any, **_: Any) -> Any:  # the real one needs a C++ compiler and ten seconds
        def run(*inputs: Any, **named: Any) -> Any:
            compiled.append(function)
            return function(*inputs, **named)

        return run

    monkeypatch.setattr("torch.compile", stand_in)
    folder = str(save_tiny_model(tmp_path / "gpt2", n_layers=N_LAYERS))
    model = load_language_model(ModelSettings(model=folder), compile_model=True)
    captured, expected = (m.capture(TOKENS, m.resolve_sites("0,1")) for m in (model, gpt2))
    assert [type(function.__self__).__name__ for function in compiled] == ["GPT2MLP", "GPT2MLP"]
    assert all(torch.equal(captured[hook], expected[hook]) for hook in expected)


def test_a_machine_that_cannot_compile_is_told_to_run_without(gpt2: LanguageModel) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_: Any) -> None:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\nmore")

    handle = gpt2.bridge.blocks[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(ModelError, match=r"No working C\+\+ compiler found; run without compiling$"):
            gpt2.capture(TOKENS, gpt2.resolve_sites("0"))
    finally:
        handle.remove()


def test_compatibility_mode_gives_other_inputs_and_the_same_outputs(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "llama", "llama"))
    raw, folded = (
        load_language_model(ModelSettings.model_validate({"model": folder, "processing": processing}))
        for processing in ("raw", "compatibility")
    )
    (site,) = raw.resolve_sites("0")
    first, second = raw.capture(TOKENS, [site]), folded.capture(TOKENS, [site])
    change = {hook: float((first[hook] - second[hook]).norm() / first[hook].norm()) for hook in first}
    assert change[site.hook_in] > 0.1
    assert change[site.hook_out] < 1e-5
    assert not folded.check_pairing(TOKENS, site).applicable
