"""Models of families that differ from most: what is said about them is what the model computes, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailrace.analysis.circuits.attribution_graph import top_logits
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import logit_root
from tailrace.analysis.splice.replacement import EVERY_POSITION, Unchanged, run_replaced
from tailrace.pipeline.model.checks import has_neurons
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError
from tests.support.families import Family, reference, save_family

PROMPT = torch.tensor([2, 9, 30, 17, 4, 61, 25])


def loaded(path: Path, architecture: str, processing: Any = "raw", **own: Any) -> LanguageModel:
    folder = save_family(path / "model", Family(architecture, own=own))
    return load_language_model(ModelSettings(model=str(folder), processing=processing))


def own_logits(path: Path, architecture: str) -> torch.Tensor:
    """Return the logits of ``PROMPT`` by transformers alone, (T, d_vocab) in float64."""
    with torch.inference_mode():
        return reference(path / "model", Family(architecture))(PROMPT[None], use_cache=False).logits[0].double()


# What follows the unembedding (case 07)


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("CohereForCausalLM", {}),
        ("GraniteForCausalLM", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        ("Gemma2ForCausalLM", {}),
    ],
)
def test_circuits_explain_the_models_own_logits(tmp_path: Path, architecture: str, own: dict[str, Any]) -> None:
    model = loaded(tmp_path, architecture, **own)
    logits = own_logits(tmp_path, architecture)
    weights = read_weights(model)
    run = record_run(model.bridge, weights, {}, PROMPT, allow_opaque=True)
    before_the_cap = 30.0 * torch.atanh(logits[-1] / 30.0) if weights.logit_cap else logits[-1]  # Gemma 2's is 30
    for token in (5, 40):
        assert logit_root(run, token).value == pytest.approx(float(before_the_cap[token]), rel=1e-4, abs=1e-5)
    probabilities = logits[-1].softmax(-1)
    for token, probability in top_logits(run, -1, mass=1.0, at_most=5):
        assert probability == pytest.approx(float(probabilities[token]), rel=1e-4)


def test_logits_that_are_no_multiple_of_the_unembedding_are_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, "LlamaForCausalLM")
    head = model.bridge.unembed.original_component
    plain = head.forward
    head.forward = lambda x: plain(x) + plain(x).square()
    with pytest.raises(ModelError, match="logits are not the final norm of the stream times the unembedding"):
        read_weights(model)


# Hooks that hold something else than their names say (cases 13 and 15)


@pytest.mark.parametrize(
    ("architecture", "processing"), [("BloomForCausalLM", "raw"), ("MptForCausalLM", "compatibility")]
)
def test_an_mlp_that_adds_the_stream_is_refused_with_the_hook_of_its_own_output(
    tmp_path: Path, architecture: str, processing: str
) -> None:
    model = loaded(tmp_path, architecture, processing)
    for asked in [("1", ()), (None, ("layer1=blocks.1.mlp.hook_out",))]:
        with pytest.raises(ModelError) as caught:
            model.resolve_sites(*asked)
        assert "blocks.1.mlp.hook_out is no function of blocks.1.mlp.hook_in alone" in str(caught.value)
        assert "--hooks layer1=blocks.1.mlp.hook_in:blocks.1.hook_mlp_out" in str(caught.value)


def test_what_is_advised_there_is_what_the_mlp_adds(tmp_path: Path) -> None:
    model = loaded(tmp_path, "BloomForCausalLM")
    sites = model.resolve_sites(None, ["layer1=blocks.1.mlp.hook_in:blocks.1.hook_mlp_out"])
    mlp = reference(tmp_path / "model", Family("BloomForCausalLM")).transformer.h[1].mlp
    captured = model.capture(PROMPT[None], sites)
    inputs, outputs = captured[sites[0].hook_in].clone(), captured[sites[0].hook_out].clone()
    torch.testing.assert_close(outputs, mlp(inputs, torch.zeros_like(inputs)), rtol=1e-5, atol=1e-5)


def test_coordinates_of_the_output_of_experts_are_no_neurons(tmp_path: Path) -> None:
    model = loaded(tmp_path, "MixtralForCausalLM")
    assert not has_neurons("blocks.1.mlp.hook_post", model.bridge.hook_dict)
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.hook_post is blocks\.1\.mlp\.hook_out under another name"):
        model.resolve_sites(None, ["blocks.1.mlp.hook_post"])
    dense = loaded(tmp_path / "dense", "LlamaForCausalLM")
    assert has_neurons("blocks.1.mlp.hook_post", dense.bridge.hook_dict)


def test_blocks_without_an_mlp_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layers 0, 1: no MLP of its own .*; name what is to be cached with --hooks"):
        loaded(tmp_path, "MambaForCausalLM").resolve_sites("all")


# What TransformerLens half supports (cases 28 and 30)


def test_embeddings_narrower_than_the_stream_are_refused_where_weights_are_read(tmp_path: Path) -> None:
    model = loaded(tmp_path, "OPTForCausalLM", word_embed_proj_dim=8, do_layer_norm_before=False)
    assert model.capture(PROMPT[None], model.resolve_sites("1"))
    with pytest.raises(ModelError, match="what enters block 0 is not the token's embedding plus its position's"):
        read_weights(model)


def test_a_failure_to_load_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded: split_with_sizes expects"):
        loaded(tmp_path, "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2)


def test_a_failure_in_the_first_pass_is_a_sentence_at_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fails in transformer_lens [\d.]+: .*only half supported"):
        loaded(tmp_path, "GraniteMoeHybridForCausalLM")


def test_a_failure_of_ours_in_a_pass_keeps_its_traceback(tmp_path: Path) -> None:
    model = loaded(tmp_path, "LlamaForCausalLM")

    def fail(*_: Any) -> None:
        raise RuntimeError("ours")

    handle = model.bridge.blocks[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="ours"):
            model.capture(PROMPT[None], model.resolve_sites("0"))
    finally:
        handle.remove()


# Other kinds of models


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("T5ForConditionalGeneration", "an encoder with a decoder"),
        ("BertForMaskedLM", "which fills in masked tokens and sees those after them"),
        ("ViTForImageClassification", "which reads images"),
        ("Qwen2AudioForConditionalGeneration", "which reads audio"),
    ],
)
def test_what_is_no_language_model_is_refused_before_its_weights(tmp_path: Path, architecture: str, what: str) -> None:
    with pytest.raises(ModelError, match=f"is {architecture}, {what}; only language models that predict"):
        loaded(tmp_path, architecture)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its predictions change with tokens that come later"):
        loaded(tmp_path, "BertLMHeadModel")
    assert loaded(tmp_path / "causal", "BertLMHeadModel", is_decoder=True).n_layers == 2


def test_an_architecture_that_is_not_listed_is_refused_by_its_name_alone(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", Family("LlamaForCausalLM"))
    change_config(folder, model_type="helium", architectures=["HeliumForCausalLM"])
    with pytest.raises(ModelError, match=r"is HeliumForCausalLM, which TransformerLens .* does not support") as caught:
        load_language_model(ModelSettings(model=str(folder)))
    assert "AfmoeForCausalLM" not in str(caught.value)


# Quantised checkpoints


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes, 8-bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"gptq, 4-bit"),
        ({"quant_method": "awq", "bits": 4}, r"awq, 4-bit"),
        ({"quant_method": "bitnet"}, r"bitnet"),
        ({"bits": 4}, r"unnamed method, 4-bit"),
    ],
)
def test_quantised_weights_are_refused_before_they_are_read(
    tmp_path: Path, written: dict[str, Any], named: str
) -> None:
    folder = save_family(tmp_path / "model", Family("LlamaForCausalLM"))
    change_config(folder, quantization_config=written)
    with pytest.raises(ModelError, match=rf"its weights are quantised \({named}\), and only fp8 and mxfp4 are written"):
        load_language_model(ModelSettings(model=str(folder)))


def test_weights_in_fp8_are_cached_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", Family("LlamaForCausalLM"))
    plain = load_file(folder / "model.safetensors")
    coded, meant = dict(plain), dict(plain)
    for name, weight in plain.items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            coded[name] = (weight / scale).to(torch.float8_e4m3fn)
            coded[f"{name}_scale_inv"] = scale.reshape(1, 1)
            meant[name] = coded[name].float() * scale
    save_file(coded, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(
        folder,
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    )
    written_out = save_family(tmp_path / "written out", Family("LlamaForCausalLM"))
    save_file(meant, written_out / "model.safetensors", metadata={"format": "pt"})
    quantised, expected = (
        model.capture(PROMPT[None], model.resolve_sites("all"))
        for model in (load_language_model(ModelSettings(model=str(one))) for one in (folder, written_out))
    )
    for hook, value in expected.items():
        torch.testing.assert_close(quantised[hook], value, rtol=1e-5, atol=1e-5)


# The table in the docs, and what it is made of


def test_an_identity_in_place_of_every_mlp_keeps_the_models_logits(tmp_path: Path) -> None:
    model = loaded(tmp_path, "CohereForCausalLM")
    sites = model.resolve_sites("all")
    replaced = {as_site(one, model.d_model): Unchanged() for one in sites}
    with torch.inference_mode():
        logits = run_replaced(model.bridge, PROMPT[None], replaced, EVERY_POSITION)[0].double()
    torch.testing.assert_close(logits, own_logits(tmp_path, "CohereForCausalLM"), rtol=1e-5, atol=1e-6)


def as_site(hooks: SiteHooks, width: int) -> Site:
    return Site(*hooks, width, width, "float32")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
