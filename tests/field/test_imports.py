"""Files of other tools as people have them: what each release wrote is read as that release meant it, or refused."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tailrace.pipeline.formats import import_transcoder
from tailrace.pipeline.formats.settings import ImportSettings
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.layered_transcoders import mlp_site, publish_site_cache

CASES = Path(__file__).parent / "cases"
WIDTH, D_SAE = 128, 8
INPUTS = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
"""Of float32 sums over 128 numbers in another order."""


def one_hook(hook):
    return Site(hook, hook, hook, WIDTH, WIDTH, "float32")


SITES = [
    mlp_site(1, WIDTH, WIDTH),
    one_hook("blocks.1.hook_resid_pre"),
    one_hook("blocks.1.hook_resid_post"),
    one_hook("blocks.1.mlp.hook_out"),
    one_hook("blocks.1.attn.hook_z"),
    one_hook("blocks.1.attn.hook_z[1]"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    model = {"name": "tiny-lm", "architecture": "GPT2LMHeadModel", "processing": "raw", "n_layers": 2, "d_model": WIDTH}
    return publish_site_cache(tmp_path_factory.mktemp("field") / "cache", SITES, model=model, n_rows=256)


def take(origin, source, cache, output, **settings):
    return import_transcoder.run(ImportSettings(**settings), source=source, origin=origin, cache=cache, output=output)


def top_k(pre, k):
    values, features = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, features, values)


def random_tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name.replace("_weight", ".weight"): torch.randn(*shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


def saelens_pre(tensors):
    return (INPUTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]


def write_folder(path, config, tensors):
    path.mkdir(parents=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


# SAELens (case 03)

OLDER = {
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": D_SAE,
    "hook_name": "blocks.1.hook_resid_pre",
    "dtype": "float32",
}


def test_topk_of_releases_2_to_5_is_topk_at_the_hook_it_names(tmp_path, cache):
    source = CASES / "03-saelens-topk-of-release-3-becomes-relu"
    result = take("saelens", source, cache, tmp_path / "back")
    assert result.sites == ["blocks.1.hook_resid_pre"]
    tensors = load_file(source / "sae_weights.safetensors")
    activations = top_k(saelens_pre(tensors), 2)
    again = load_transcoder(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), activations, **CLOSE)
    torch.testing.assert_close(again(INPUTS), activations @ tensors["W_dec"] + tensors["b_dec"], **CLOSE)


@pytest.mark.parametrize("name", ["activation_fn", "activation_fn_str"])
def test_an_activation_function_without_a_counterpart_is_refused_by_name(tmp_path, cache, name):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    source = write_folder(tmp_path / "sae", {**OLDER, name: "tanh-relu"}, tensors)
    with pytest.raises(ArtifactMismatch, match=rf"cfg\.json: .*{name} is 'tanh-relu', wanted relu, topk"):
        take("saelens", source, cache, tmp_path / "back")


def test_every_key_that_is_not_known_is_refused_by_name_with_the_others(tmp_path, cache):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    config = {
        **OLDER,
        "soft_clip": 3.0,
        "normalize_activations": "layer_norm",
        "activation_fn": "relu",
        "activation_fn_str": "topk",
    }
    source = write_folder(tmp_path / "sae", config, tensors)
    with pytest.raises(ArtifactMismatch) as refused:
        take("saelens", source, cache, tmp_path / "back")
    for reason in ("soft_clip is 3.0, a key that is not known", "layer_norm", "activation_fn and activation_fn_str"):
        assert reason in str(refused.value)


@pytest.mark.parametrize("k", [None, 0, 2.5])
def test_topk_without_a_usable_k_is_refused(tmp_path, cache, k):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    config = {**OLDER, "activation_fn_str": "topk", "activation_fn_kwargs": {} if k is None else {"k": k}}
    with pytest.raises(ArtifactMismatch, match=f"k is {k}, wanted a number of features"):
        take("saelens", write_folder(tmp_path / "sae", config, tensors), cache, tmp_path / "back")


def test_factors_of_release_2_scale_what_features_write(tmp_path, cache):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    factors = torch.linspace(0.5, 2, D_SAE)
    config = {**OLDER, "finetuning_scaling_factor": True}
    source = write_folder(tmp_path / "sae", config, {**tensors, "scaling_factor": factors})
    take("saelens", source, cache, tmp_path / "back")
    wanted = (saelens_pre(tensors).relu() * factors) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), wanted, **CLOSE)
    source = write_folder(
        tmp_path / "unused", {**OLDER, "finetuning_scaling_factor": False}, {**tensors, "scaling_factor": factors}
    )
    with pytest.raises(ArtifactMismatch, match="finetuning_scaling_factor is false"):
        take("saelens", source, cache, tmp_path / "unused-back")


def test_firing_rates_beside_the_weights_are_compared_with_the_cache_s_rows(tmp_path, cache):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    source = write_folder(tmp_path / "sae", OLDER, tensors)
    rates = torch.tensor([0.5] * 6 + [0.0] * 2)
    save_file({"sparsity": torch.log10(rates + 1e-10)}, source / "sparsity.safetensors")
    result = take("saelens", source, cache, tmp_path / "back")
    firing = TranscoderManifest.read(tmp_path / "back").as_json()["origin"]["firing"]
    assert firing == {"l0": pytest.approx(3, rel=1e-6), "silent": 2}
    assert any("L0 was 3.0 when it was trained, 2 features silent" in note for note in result.notes)
    save_file({"sparsity": torch.zeros(5)}, source / "sparsity.safetensors")
    with pytest.raises(ArtifactMismatch, match=r"holds values of shape \(5,\) for 8 features"):
        take("saelens", source, cache, tmp_path / "again")


# Settings that change nothing (case 38)


@pytest.mark.parametrize("spelling", ["null", "false", "ones", "negative", "hook_z"])
def test_settings_that_change_nothing_are_passed_by(tmp_path, cache, spelling):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    config = {**OLDER, "activation_fn": "relu", "apply_b_dec_to_input": True}
    activations = saelens_pre(tensors).relu()
    if spelling in ("null", "false"):
        config["normalize_activations"] = {"null": None, "false": False}[spelling]
    elif spelling == "ones":
        tensors["scaling_factor"] = torch.ones(D_SAE)
    elif spelling == "negative":
        config["architecture"] = "jumprelu"
        tensors["threshold"] = torch.tensor([-0.01] + [0.1] * 7)
        activations = activations * (saelens_pre(tensors) > tensors["threshold"])
    else:
        metadata = {"hook_name": "blocks.1.attn.hook_z", "sae_lens_version": "6.18.0"}
        config |= {"reshape_activations": "hook_z", "metadata": metadata}
    result = take("saelens", write_folder(tmp_path / "sae", config, tensors), cache, tmp_path / "back")
    assert result.sites == ["blocks.1.attn.hook_z" if spelling == "hook_z" else "blocks.1.hook_resid_pre"]
    again = load_transcoder(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), activations, **CLOSE)


def test_a_head_is_the_site_that_names_it(tmp_path, cache):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    metadata = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 1}
    source = write_folder(tmp_path / "sae", {"architecture": "standard", "metadata": metadata}, tensors)
    assert take("saelens", source, cache, tmp_path / "back").sites == ["blocks.1.attn.hook_z[1]"]


def test_a_site_named_against_what_the_files_say_is_a_note(tmp_path, cache):
    tensors = load_file(CASES / "38-settings-that-change-nothing-are-refused/weights.safetensors")
    metadata = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    config = {"architecture": "transcoder", "apply_b_dec_to_input": False, "metadata": metadata}
    source = write_folder(tmp_path / "folded", config, tensors)
    result = take("saelens", source, cache, tmp_path / "back", site="layer1")
    assert any("reads blocks.1.ln2.hook_normalized" in note and "before a norm's gain" in note for note in result.notes)
    config["metadata"] = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    result = take("saelens", write_folder(tmp_path / "same", config, tensors), cache, tmp_path / "same-back")
    assert result.sites == ["layer1"]
    assert not any("its files say that it reads" in note for note in result.notes)


# sparsify (case 06)

OF_2024 = {
    "expansion_factor": 1,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": 2,
    "multi_topk": False,
    "d_in": WIDTH,
}


def sparsify_folder(path, config, *, skips):
    tensors = random_tensors(
        encoder_weight=(D_SAE, WIDTH),
        encoder_bias=(D_SAE,),
        W_dec=(D_SAE, WIDTH),
        b_dec=(WIDTH,),
        W_skip=(WIDTH, WIDTH),
    )
    tensors["encoder.bias"] = tensors.pop("encoder_bias")
    if not skips:
        del tensors["W_skip"]
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, path / "sae.safetensors")
    return tensors


def test_a_skip_transcoder_of_2024_reads_the_module_s_input(tmp_path, cache):
    tensors = sparsify_folder(tmp_path / "layers.1.mlp", {**OF_2024, "skip_connection": True}, skips=True)
    result = take("sparsify", tmp_path / "layers.1.mlp", cache, tmp_path / "back")
    assert result.sites == ["layer1"]
    assert any("before February 2025" in note and "taken for a transcoder" in note for note in result.notes)
    pre = (INPUTS - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    wanted = top_k(pre, 2) @ tensors["W_dec"] + tensors["b_dec"] + INPUTS @ tensors["W_skip"].T
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), wanted, **CLOSE)


def test_without_a_skip_path_the_import_says_what_it_took_a_file_of_2024_for(tmp_path, cache):
    sparsify_folder(tmp_path / "layers.1.mlp", OF_2024, skips=False)
    result = take("sparsify", tmp_path / "layers.1.mlp", cache, tmp_path / "back")
    assert result.sites == ["blocks.1.mlp.hook_out"]
    assert any("taken for an autoencoder of blocks.1.mlp.hook_out" in note for note in result.notes)


def test_a_layer_s_own_coder_is_of_the_stream_behind_it(tmp_path, cache):
    sparsify_folder(tmp_path / "layers.1", {**OF_2024, "transcode": False}, skips=False)
    result = take("sparsify", tmp_path / "layers.1", cache, tmp_path / "back")
    assert result.sites == ["blocks.1.hook_resid_post"]
    assert not any("do not say" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "value"), [("signed", True), ("activation", "groupmax"), ("gram_lookup", True), ("new", 1)]
)
def test_sparsify_s_keys_without_a_counterpart_are_refused_by_name(tmp_path, cache, name, value):
    sparsify_folder(tmp_path / "layers.1.mlp", {**OF_2024, "transcode": True, name: value}, skips=False)
    with pytest.raises(ArtifactMismatch, match=rf"cfg\.json: .*{name} is {value!r}"):
        take("sparsify", tmp_path / "layers.1.mlp", cache, tmp_path / "back")


# circuit-tracer (cases 36 and 37)

SET = (
    "model_name: tiny-lm\nmodel_kind: transcoder_set\n"
    "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
)


def set_layer(path, config=SET, **more):
    tensors = random_tensors(W_enc=(D_SAE, WIDTH), b_enc=(D_SAE,), W_dec=(D_SAE, WIDTH), b_dec=(WIDTH,))
    path.mkdir()
    (path / "config.yaml").write_text(config)
    save_file({**tensors, **more}, path / "layer_1.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (SET + "activation: topk\nk: 2\n", {"k": torch.tensor(2)}),
        (SET + "activation: topk\nk: 2\n", {}),
        (SET, {"k": torch.tensor(2)}),
    ],
)
def test_a_topk_set_is_topk_with_k_from_either_file(tmp_path, cache, config, more):
    tensors = set_layer(tmp_path / "set", config, **more)
    result = take("circuit-tracer", tmp_path / "set/layer_1.safetensors", cache, tmp_path / "back")
    assert result.sites == ["layer1"]
    assert any("fewer than k features are above zero" in note for note in result.notes)
    activations = top_k(INPUTS @ tensors["W_enc"].T + tensors["b_enc"], 2)
    torch.testing.assert_close(load_transcoder(tmp_path / "back").encode(INPUTS), activations, **CLOSE)


@pytest.mark.parametrize(
    ("config", "more", "reason"),
    [
        (SET + "activation: topk\n", {}, "neither it nor layer_1.safetensors says k"),
        (SET + "activation: topk\nk: 3\n", {"k": torch.tensor(2)}, "2 in layer_1.safetensors, 3 in config.yaml"),
        (SET + "k: 3\n", {}, "k is 3, without activation: topk"),
        (SET + "activation: topk\nk: 2\n", {"activation_function.threshold": torch.ones(D_SAE)}, "another rule"),
        (SET + "activation: groupmax\n", {}, "activation is 'groupmax', wanted none, topk, relu"),
        (SET + "temperature: 2\n", {}, "temperature is 2, a key that is not known here"),
    ],
)
def test_a_set_that_contradicts_itself_is_refused_by_name(tmp_path, cache, config, more, reason):
    set_layer(tmp_path / "set", config, **more)
    with pytest.raises(ArtifactMismatch, match=reason):
        take("circuit-tracer", tmp_path / "set/layer_1.safetensors", cache, tmp_path / "back")


@pytest.mark.parametrize("shape", [(1, D_SAE), (D_SAE,), (), (1,)])
def test_a_threshold_with_a_leading_one_is_the_same(tmp_path, cache, shape):
    threshold = torch.full(shape, 0.7)
    tensors = set_layer(tmp_path / "set", **{"activation_function.threshold": threshold})
    take("circuit-tracer", tmp_path / "set/layer_1.safetensors", cache, tmp_path / "back")
    pre = INPUTS @ tensors["W_enc"].T + tensors["b_enc"]
    torch.testing.assert_close(load_transcoder(tmp_path / "back").encode(INPUTS), pre * (pre > 0.7), **CLOSE)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("activation_function.threshold", (2, 4)),
        ("W_skip", (WIDTH,)),
        ("k", (3,)),
        ("activation_function.threshold", (9,)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_its_shape(tmp_path, cache, name, shape):
    set_layer(tmp_path / "set", **{name: torch.ones(shape)})
    with pytest.raises(
        ArtifactCorrupt, match=f"{name} has shape {shape}, wanted".replace("(", r"\(").replace(")", r"\)")
    ):
        take("circuit-tracer", tmp_path / "set/layer_1.safetensors", cache, tmp_path / "back")


# Gemma Scope (case 42)

NPZ = CASES / "42-gemma-scope-npz-called-damaged/layer_1/params.npz"


def gemma_activations(arrays):
    pre = INPUTS @ arrays["W_enc"] + arrays["b_enc"]
    return pre.relu() * (pre > arrays["threshold"])


def test_gemma_scope_s_npz_computes_its_own_formula(tmp_path, cache):
    take("gemma-scope", NPZ, cache, tmp_path / "back", site="layer1")
    arrays = {name: torch.from_numpy(value) for name, value in np.load(NPZ).items()}
    activations = gemma_activations(arrays)
    assert 0 < int((activations > 0).sum()) < activations.numel()
    again = load_transcoder(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), activations, **CLOSE)
    torch.testing.assert_close(again(INPUTS), activations @ arrays["W_dec"] + arrays["b_dec"], **CLOSE)


def test_the_repository_s_name_on_the_path_says_where_it_belongs(tmp_path, cache):
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders/layer_1/width_16k"
    folder.mkdir(parents=True)
    (folder / "params.npz").write_bytes(NPZ.read_bytes())
    with pytest.raises(ArtifactMismatch, match=r"--hooks blocks\.1\.ln2\.hook_normalized:blocks\.1\.hook_mlp_out"):
        take("gemma-scope", folder / "params.npz", cache, tmp_path / "back")


@pytest.mark.parametrize("origin", ["circuit-tracer", "reference", "saelens"])
def test_gemma_scope_s_npz_is_not_called_damaged(tmp_path, cache, origin):
    with pytest.raises(ArtifactMismatch, match="--from gemma-scope"):
        take(origin, NPZ, cache, tmp_path / "back", site="layer1")


def test_gemma_scope_2_is_read_with_its_affine_path(tmp_path, cache):
    arrays = {name: torch.from_numpy(value) for name, value in np.load(NPZ).items()}
    skip = random_tensors(affine=(WIDTH, WIDTH))["affine"]
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    save_file(
        {**{names.get(key, key): value for key, value in arrays.items()}, "affine_skip_connection": skip},
        tmp_path / "params.safetensors",
    )
    config = {
        "architecture": "jump_relu", "affine_connection": True, "model_name": "google/gemma-3-1b-pt", "l0": 7,
        "width": D_SAE, "type": "transcoder", "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = take("gemma-scope", tmp_path / "params.safetensors", cache, tmp_path / "back")
    assert result.sites == ["layer1"]  # of a model without a norm behind its MLP both names are the MLP's output
    wanted = gemma_activations(arrays) @ arrays["W_dec"] + arrays["b_dec"] + INPUTS @ skip
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), wanted, **CLOSE)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "topk"}))
    with pytest.raises(ArtifactMismatch, match="architecture is 'topk', wanted jump_relu"):
        take("gemma-scope", tmp_path / "params.safetensors", cache, tmp_path / "again")


# Checkpoints of the original code


@pytest.fixture
def configuration(monkeypatch):
    """The pickled configuration's class, as if its code were installed while writing only."""
    module = types.ModuleType("sae_training.config")
    made = type("LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"})
    vars(module)["LanguageModelSAERunnerConfig"] = made
    monkeypatch.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
    monkeypatch.setitem(sys.modules, "sae_training.config", module)
    return made


def reference_state():
    tensors = random_tensors(
        W_enc=(WIDTH, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, WIDTH), b_dec=(WIDTH,), b_dec_out=(WIDTH,)
    )
    return OrderedDict(tensors)


def reference_outputs(state):
    return ((INPUTS - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu() @ state["W_dec"] + state["b_dec_out"]


def pickled(path, configuration, **changed):
    config = configuration()
    config.__dict__.update({
        "model_name": "gpt2-small", "hook_point": "blocks.1.mlp.hook_in", "out_hook_point": "blocks.1.mlp.hook_out",
        "is_transcoder": True, "dtype": torch.float32, "device": torch.device("cpu"),
        "l1_coefficient": np.float64(1e-4), **changed,
    })  # fmt: skip
    state = reference_state()
    data = pickle.dumps({"cfg": config, "state_dict": state})
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return state


@pytest.mark.parametrize("name", ["t.pkl.gz", "t.pkl"])
def test_a_bare_pickle_computes_its_formula_with_the_rates_beside_it(tmp_path, cache, configuration, monkeypatch, name):
    state = pickled(tmp_path / name, configuration)
    torch.save(torch.full((D_SAE,), -1.0), tmp_path / "t_log_feature_sparsity.pt")
    monkeypatch.delitem(sys.modules, "sae_training.config")
    monkeypatch.delitem(sys.modules, "sae_training")
    result = take("reference", tmp_path / name, cache, tmp_path / "back")
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), reference_outputs(state), **CLOSE)
    assert "sae_training" not in sys.modules
    assert any("L0 was 0.8 when it was trained" in note for note in result.notes)
    manifest = TranscoderManifest.read(tmp_path / "back")
    assert manifest.as_json()["architecture"] == {"kind": "relu", "input_bias": False}  # none of our own defaults
    assert manifest.as_json()["origin"]["facts"]["l1_coefficient"] == pytest.approx(1e-4)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class NestedTrap:
    """A storage whose bytes are a pickle that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Trap(self.path)),)


@pytest.mark.parametrize("trap", [Trap, NestedTrap])
def test_a_bare_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, cache, configuration, trap):
    pickled(tmp_path / "t.pkl.gz", configuration, wandb_entity=trap(tmp_path / "sprung"))
    with pytest.raises((ArtifactMismatch, ArtifactCorrupt)):
        take("reference", tmp_path / "t.pkl.gz", cache, tmp_path / "back")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_changes_no_function_that_it_may_call(tmp_path, cache):
    # BUILD with a pair of states sets attributes: here the defaults of what rebuilds tensors
    before = torch._utils._rebuild_tensor_v2.__defaults__
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x01tstb."
    (tmp_path / "t.pkl").write_bytes(stream)
    with pytest.raises((ArtifactMismatch, ArtifactCorrupt)):
        take("reference", tmp_path / "t.pkl", cache, tmp_path / "back")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_tensors_alone_are_read_from_safetensors_and_must_be_told_their_site(tmp_path, cache):
    state = reference_state()
    save_file(dict(state), tmp_path / "t.safetensors")
    take("reference", tmp_path / "t.safetensors", cache, tmp_path / "back", site="layer1")
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), reference_outputs(state), **CLOSE)


def test_a_setting_that_changes_the_formula_is_refused_by_name(tmp_path, cache, configuration):
    pickled(tmp_path / "t.pkl", configuration, activation_fn="tanh-relu", novelty=1)
    with pytest.raises(ArtifactMismatch, match=r"activation_fn is 'tanh-relu', wanted relu.*novelty is 1, a key"):
        take("reference", tmp_path / "t.pkl", cache, tmp_path / "back")


# dictionary_learning


def test_negative_thresholds_and_unknown_keys_of_dictionary_learning(tmp_path, cache):
    tensors = random_tensors(W_enc=(WIDTH, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, WIDTH), b_dec=(WIDTH,))
    tensors["threshold"] = torch.linspace(-0.5, 0.5, D_SAE)
    folder = tmp_path / "d"
    folder.mkdir()
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": "JumpReluAutoEncoder", "bandwidth": 0.001, "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    assert take("dictionary-learning", folder, cache, tmp_path / "back").sites == ["blocks.1.hook_resid_post"]
    pre = INPUTS @ tensors["W_enc"] + tensors["b_enc"]
    wanted = pre.relu() * (pre > tensors["threshold"])
    torch.testing.assert_close(load_transcoder(tmp_path / "back").encode(INPUTS), wanted, **CLOSE)
    (folder / "config.json").write_text(json.dumps({"trainer": {**trainer, "clip": 4}}))
    with pytest.raises(ArtifactMismatch, match="clip is 4, a key that is not known here"):
        take("dictionary-learning", folder, cache, tmp_path / "again")


def test_a_cross_layer_set_s_keys_are_known_too(tmp_path, cache):
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\nactivation: topk\nk: 3\n")
    with pytest.raises(ArtifactMismatch, match="activation is 'topk'; of a cross-layer transcoder"):
        take("circuit-tracer", tmp_path, cache, tmp_path / "out")
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\nsoft: 1\n")
    with pytest.raises(ArtifactMismatch, match="soft is 1, a key that is not known here"):
        take("circuit-tracer", tmp_path, cache, tmp_path / "out")
