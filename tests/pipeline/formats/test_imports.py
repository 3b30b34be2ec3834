"""Imported transcoders compute what their files say, run nothing that those hold, and work like trained ones."""

from __future__ import annotations

import json
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.formats import export, import_transcoder
from tailrace.pipeline.formats.settings import ExportSettings, ImportSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.training.architectures import BatchTopK, JumpReLU, ReLU, TopK
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.loop.evaluate import evaluate, predictor
from tailrace.training.rows.batches import iter_once
from tests.support.layered_transcoders import (
    MODEL,
    mlp_site,
    publish_site_cache,
    publish_transcoder,
    random_transcoder,
    sae_site,
)
from tests.support.synthetic_cache import extend_in_steps, write_synthetic_cache

INPUTS = torch.randn(200, 8, generator=torch.Generator().manual_seed(5))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SITES = [mlp_site(0), mlp_site(1), sae_site(1)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return publish_site_cache(tmp_path_factory.mktemp("imports") / "cache", SITES)


def take(origin, source, cache, output, **settings):
    return import_transcoder.run(ImportSettings(**settings), source=source, origin=origin, cache=cache, output=output)


def exported(to, path, architecture, site, **settings):
    """Publish a random transcoder below ``path`` and export it; return its module."""
    module = random_transcoder(architecture, site)
    one_layer = {**MODEL, "n_layers": 1}
    publish_transcoder(path / "ours", module, architecture, site, model=one_layer)
    export.run(ExportSettings(**settings), to=to, sources=[path / "ours"], output=path / to)
    return module


def assert_same(path, module):
    again = load_transcoder(path)
    torch.testing.assert_close(again.encode(INPUTS), module.encode(INPUTS), **CLOSE)
    torch.testing.assert_close(again(INPUTS), module(INPUTS), **CLOSE)


@pytest.mark.parametrize(
    ("architecture", "site"),
    [
        (ReLU(), mlp_site(1)),
        (ReLU(skip=True), mlp_site(1)),
        (JumpReLU(), mlp_site(1)),
        (BatchTopK(skip=True), mlp_site(1)),
        (ReLU(), sae_site(1)),
        (TopK(k=3), sae_site(1)),
    ],
)
def test_a_round_trip_through_saelens_changes_nothing(tmp_path, cache, architecture, site):
    module = exported("saelens", tmp_path, architecture, site)
    result = take("saelens", tmp_path / "saelens", cache, tmp_path / "back")
    assert (result.sites, result.d_sae) == ([site.name], 24)
    assert_same(tmp_path / "back", module)
    assert verify_artifact(tmp_path / "back", "transcoder") == []


def test_an_export_of_ours_that_has_changed_is_refused(tmp_path, cache):
    exported("saelens", tmp_path, ReLU(), mlp_site(1))
    weights = tmp_path / "saelens/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactCorrupt, match=r"sae_weights\.safetensors: checksum is"):
        take("saelens", tmp_path / "saelens", cache, tmp_path / "back")


@pytest.mark.parametrize("architecture", [ReLU(), JumpReLU(skip=True)])
def test_a_round_trip_through_circuit_tracer_changes_nothing(tmp_path, cache, architecture):
    module = exported("circuit-tracer", tmp_path, architecture, mlp_site(0))
    result = take("circuit-tracer", tmp_path / "circuit-tracer/layer_0.safetensors", cache, tmp_path / "back")
    assert result.sites == ["layer0"]
    assert_same(tmp_path / "back", module)


@pytest.mark.parametrize("site", [mlp_site(1), sae_site(1)])
def test_a_round_trip_through_sparsify_changes_nothing(tmp_path, cache, site):
    module = exported("sparsify", tmp_path, TopK(k=3), site)
    result = take("sparsify", tmp_path / "sparsify/h.1.mlp", cache, tmp_path / "back")
    assert result.sites == [site.name]
    assert_same(tmp_path / "back", module)


def test_a_folder_with_one_module_stands_for_it_and_of_several_one_is_to_be_named(tmp_path, cache):
    module = exported("sparsify", tmp_path, TopK(k=3), mlp_site(1))
    assert take("sparsify", tmp_path / "sparsify", cache, tmp_path / "back").sites == ["layer1"]
    assert_same(tmp_path / "back", module)
    for number in (0, 10):
        shutil.copytree(tmp_path / "sparsify/h.1.mlp", tmp_path / f"sparsify/h.{number}.mlp")
    with pytest.raises(
        ArtifactMismatch, match=r"holds 3 transcoders, h\.0\.mlp, h\.1\.mlp, h\.10\.mlp; .*sparsify/h\.0"
    ):
        take("sparsify", tmp_path / "sparsify", cache, tmp_path / "new")
    with pytest.raises(ArtifactMissing, match=r"cfg\.json, .*sae\.safetensors: not there"):
        take("sparsify", tmp_path / "ours", cache, tmp_path / "new")


def test_an_import_records_its_model_site_origin_and_how_well_it_fits(tmp_path, cache):
    module = exported("saelens", tmp_path, ReLU(), mlp_site(1))
    result = take("saelens", tmp_path / "saelens", cache, tmp_path / "back")
    manifest = TranscoderManifest.read(tmp_path / "back")
    assert manifest.model == MODEL
    assert manifest.site.hook_in == "blocks.1.mlp.hook_in"
    assert manifest.as_json()["origin"]["facts"]["architecture"] == "transcoder"
    assert sorted(manifest.as_json()["inputs"]["imported"]) == ["cfg.json", "sae_weights.safetensors"]
    site = open_cache(cache).sites["layer1"]
    expected = evaluate(predictor(module), iter_once(open_cache(cache).split("heldout"), site, batch_rows=64))
    assert result.fvu == pytest.approx([expected.fvu], rel=1e-5)
    assert result.l0 == pytest.approx([expected.l0])
    assert any("no better than a constant" in note for note in result.notes)  # its weights are random
    again = take("saelens", tmp_path / "saelens", cache, tmp_path / "back")
    assert again == result


def test_an_imported_transcoder_is_analysed_like_a_trained_one(tmp_path):
    opened = write_synthetic_cache(tmp_path / "cache", n_heldout_contexts=20)
    site = opened.sites["layer0"]
    module = random_transcoder(JumpReLU(), site)
    publish_transcoder(tmp_path / "ours", module, JumpReLU(), site, model=opened.manifest.model)
    export.run(ExportSettings(), to="saelens", sources=[tmp_path / "ours"], output=tmp_path / "theirs")
    result = take("saelens", tmp_path / "theirs", tmp_path / "cache", tmp_path / "back")
    tables = analyze.run(
        AnalyzeSettings(without_model=True),
        cache=tmp_path / "cache",
        transcoder=tmp_path / "back",
        output=tmp_path / "tables",
        compute=Compute(quiet=True),
    )
    assert tables.fvu == pytest.approx(result.fvu[0], rel=1e-5)
    assert tables.l0 == pytest.approx(result.l0[0])


def test_a_cache_that_has_grown_changes_no_import_and_no_export_that_was_begun_before(tmp_path):
    opened = write_synthetic_cache(tmp_path / "cache", n_heldout_contexts=20)
    site = opened.sites["layer0"]
    publish_transcoder(
        tmp_path / "ours", random_transcoder(TopK(k=4), site), TopK(k=4), site, model=opened.manifest.model
    )

    def both():
        given = {"to": "saelens", "sources": [tmp_path / "ours"], "output": tmp_path / "theirs"}
        exported = export.run(ExportSettings(), cache=tmp_path / "cache", **given)
        return exported, take("saelens", tmp_path / "theirs", tmp_path / "cache", tmp_path / "back")

    before = both()
    for _ in extend_in_steps(tmp_path / "cache", n_contexts=opened.split("train").n_contexts + 10):
        pass
    assert both() == before
    shutil.rmtree(tmp_path / "back")
    assert take("saelens", tmp_path / "theirs", tmp_path / "cache", tmp_path / "back").fvu == before[1].fvu


# SAELens


def saelens_folder(path, **changed):
    """Write a folder of a plain transcoder with some settings changed; return it."""
    path.mkdir()
    tensors = {
        "W_enc": torch.randn(8, 24),
        "b_enc": torch.zeros(24),
        "W_dec": torch.randn(24, 8),
        "b_dec": torch.zeros(8),
    }
    save_file(tensors, path / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp.hook_out"}
    config = {"architecture": "transcoder", "apply_b_dec_to_input": False, "metadata": metadata, **changed}
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def test_an_autoencoder_that_takes_its_bias_off_the_input_is_folded(tmp_path, cache):
    metadata = {"hook_name": sae_site(1).hook_in}
    folder = saelens_folder(tmp_path / "sae", architecture="standard", apply_b_dec_to_input=True, metadata=metadata)
    tensors = load_file(folder / "sae_weights.safetensors") | {"b_dec": torch.randn(8)}
    save_file(tensors, folder / "sae_weights.safetensors")
    take("saelens", folder, cache, tmp_path / "back")
    acts = ((INPUTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(load_transcoder(tmp_path / "back").encode(INPUTS), acts, **CLOSE)


def test_topk_ranked_by_decoder_norm_is_folded(tmp_path, cache):
    metadata = {"hook_name": sae_site(1).hook_in}
    settings = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "metadata": metadata}
    folder = saelens_folder(tmp_path / "sae", **settings)
    take("saelens", folder, cache, tmp_path / "back")
    tensors = load_file(folder / "sae_weights.safetensors")
    norms = tensors["W_dec"].norm(dim=1)
    values, features = ((INPUTS @ tensors["W_enc"]) * norms).topk(3)
    outputs = torch.einsum("rk,rkd->rd", values.relu(), (tensors["W_dec"] / norms[:, None])[features])
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), outputs, rtol=1e-4, atol=1e-4)


def test_everything_without_a_counterpart_is_told_at_once(tmp_path, cache):
    folder = saelens_folder(
        tmp_path / "sae", architecture="gated", normalize_activations="layer_norm", metadata={"hook_head_index": 3}
    )
    with pytest.raises(ArtifactMismatch) as refused:
        take("saelens", folder, cache, tmp_path / "back")
    for reason in ("architecture is 'gated', wanted transcoder", "normalize_activations is 'layer_norm'"):
        assert reason in str(refused.value)
    assert not (tmp_path / "back").exists()


def test_weights_that_make_no_transcoder_are_told_with_their_shapes(tmp_path, cache):
    folder = saelens_folder(tmp_path / "sae")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "b_enc": torch.full((24,), torch.nan)}, folder / "sae_weights.safetensors")
    with pytest.raises(ArtifactCorrupt, match="b_enc holds NaN"):
        take("saelens", folder, cache, tmp_path / "back")
    save_file({**tensors, "b_dec": torch.zeros(9)}, folder / "sae_weights.safetensors")
    with pytest.raises(ArtifactCorrupt, match=r"W_dec has shape \(24, 8\), wanted \(24, 9\)"):
        take("saelens", folder, cache, tmp_path / "back")
    save_file({**tensors, "threshold": torch.ones(24)}, folder / "sae_weights.safetensors")
    with pytest.raises(ArtifactMismatch, match="threshold, which would be ignored"):
        take("saelens", folder, cache, tmp_path / "back")


# The site


def test_hooks_the_cache_does_not_have_are_answered_with_those_it_has(tmp_path, cache):
    metadata = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    folder = saelens_folder(tmp_path / "sae", metadata=metadata)
    with pytest.raises(
        ArtifactMismatch, match=r"(?s)--hooks blocks.1.ln2.hook_normalized:blocks.1.hook_mlp_out.*layer1"
    ):
        take("saelens", folder, cache, tmp_path / "back")
    assert take("saelens", folder, cache, tmp_path / "back", site="layer1").sites == ["layer1"]


@pytest.mark.parametrize("written", ["blocks.1.mlp.hook_out", "blocks.1.hook_mlp_out"])
def test_the_mlp_s_output_is_found_under_both_of_its_names(tmp_path, cache, written):
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": written}
    folder = saelens_folder(tmp_path / "sae", metadata=metadata)
    assert take("saelens", folder, cache, tmp_path / "back").sites == ["layer1"]
    other = Site("other", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", 8, 8, "float32")
    both = publish_site_cache(tmp_path / "both", [mlp_site(1), other])
    sites = take("saelens", folder, both, tmp_path / "of-both").sites
    assert sites == [{"blocks.1.mlp.hook_out": "layer1", "blocks.1.hook_mlp_out": "other"}[written]]


def test_where_a_norm_follows_the_mlp_the_two_names_are_two_places(tmp_path):
    model = {**MODEL, "architecture": "Gemma2ForCausalLM"}
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(1)], model=model)
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    with pytest.raises(ArtifactMismatch, match=r"has no site from blocks\.1\.mlp\.hook_in to blocks\.1\.hook_mlp_out"):
        take("saelens", saelens_folder(tmp_path / "sae", metadata=metadata), cache, tmp_path / "back")


def test_a_site_must_be_told_where_the_files_do_not_say_it(tmp_path, cache):
    folder = saelens_folder(tmp_path / "sae", metadata={})
    with pytest.raises(SettingsError, match="does not say which hooks"):
        take("saelens", folder, cache, tmp_path / "back")
    with pytest.raises(SettingsError, match="there is no 'layer9'"):
        take("saelens", folder, cache, tmp_path / "back", site="layer9")


def test_a_site_of_another_width_is_refused(tmp_path):
    narrow = publish_site_cache(tmp_path / "cache", [mlp_site(1, 6, 6)])
    with pytest.raises(ArtifactMismatch, match=r"maps width 8 to 8, but of .* layer1 holds 6 and 6"):
        take("saelens", saelens_folder(tmp_path / "sae"), narrow, tmp_path / "back")


# circuit-tracer


def test_layer_files_of_the_first_release_and_negative_thresholds_are_refused(tmp_path, cache):
    tensors = {
        "W_enc": torch.randn(8, 24),
        "b_enc": torch.zeros(24),
        "W_dec": torch.randn(8, 24),
        "b_dec": torch.zeros(8),
    }
    save_file(tensors, tmp_path / "layer_0.safetensors")
    with pytest.raises(ArtifactMismatch, match="first release"):
        take("circuit-tracer", tmp_path / "layer_0.safetensors", cache, tmp_path / "back", site="layer0")
    upright = {name: value.T.contiguous() if value.ndim == 2 else value for name, value in tensors.items()}
    save_file({**upright, "activation_function.threshold": torch.full((24,), -1.0)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(ArtifactMismatch, match="24 thresholds are below zero"):
        take("circuit-tracer", tmp_path / "layer_0.safetensors", cache, tmp_path / "back", site="layer0")


def test_a_set_whose_configuration_says_topk_without_k_is_refused(tmp_path, cache):
    exported("circuit-tracer", tmp_path, ReLU(), mlp_site(0))
    with (tmp_path / "circuit-tracer/config.yaml").open("a") as config:
        config.write("activation: topk\n")
    with pytest.raises(
        ArtifactMismatch, match=r"says activation: topk, but neither it nor layer_0\.safetensors says k"
    ):
        take("circuit-tracer", tmp_path / "circuit-tracer/layer_0.safetensors", cache, tmp_path / "back")


# dictionary_learning


def dictionary_folder(path, kind, **trainer):
    """Write a folder of ``kind`` and return its tensors."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"encoder.weight": (24, 8), "encoder.bias": (24,), "decoder.weight": (8, 24), "b_dec": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "AutoEncoder":
        tensors["bias"] = tensors.pop("b_dec")
    elif kind == "JumpReluAutoEncoder":
        names = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,), "threshold": (24,)}
        tensors = {name: torch.rand(shape, generator=generator) - 0.3 for name, shape in names.items()}
        tensors["threshold"] += 0.5
    else:
        tensors |= {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(1.5)}
    path.mkdir()
    torch.save(tensors, path / "ae.pt")
    (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, **trainer}}))
    return tensors


def their_activations(kind, tensors):
    if kind == "JumpReluAutoEncoder":
        pre = INPUTS @ tensors["W_enc"] + tensors["b_enc"]
        return (pre * (pre > tensors["threshold"])).relu()
    bias = tensors["bias" if kind == "AutoEncoder" else "b_dec"]
    acts = ((INPUTS - bias) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    if kind == "BatchTopKSAE":
        return acts * (acts > tensors["threshold"])
    if kind == "AutoEncoderTopK":
        return torch.zeros_like(acts).scatter_(1, acts.topk(3).indices, acts.topk(3).values)
    return acts


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"])
def test_a_dictionary_learning_folder_computes_its_own_formula(tmp_path, cache, kind):
    tensors = dictionary_folder(tmp_path / "d", kind)
    take("dictionary-learning", tmp_path / "d", cache, tmp_path / "back", site=sae_site(1).name)
    acts = their_activations(kind, tensors)
    assert 0 < int((acts > 0).sum()) < acts.numel()
    again = load_transcoder(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), acts, **CLOSE)
    decoder = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
    outputs = acts @ decoder + tensors["bias" if kind == "AutoEncoder" else "b_dec"]
    torch.testing.assert_close(again(INPUTS), outputs, **CLOSE)


def test_a_residual_stream_s_dictionary_says_where_it_belongs_and_others_are_refused(tmp_path, cache):
    dictionary_folder(tmp_path / "d", "AutoEncoder", submodule_name="resid_post_layer_1")
    with pytest.raises(ArtifactMismatch, match=r"--hooks blocks\.1\.hook_resid_post:blocks\.1\.hook_resid_post"):
        take("dictionary-learning", tmp_path / "d", cache, tmp_path / "back")
    dictionary_folder(tmp_path / "e", "GatedAutoEncoder")
    with pytest.raises(ArtifactMismatch, match="dict_class is 'GatedAutoEncoder', wanted AutoEncoder, "):
        take("dictionary-learning", tmp_path / "e", cache, tmp_path / "back")


# The original code's checkpoints


@pytest.fixture
def configuration(monkeypatch):
    """The class whose pickled instances such checkpoints hold, as if that code were installed while writing only."""
    module = types.ModuleType("sae_training.config")

    class LanguageModelSAERunnerConfig:
        pass

    LanguageModelSAERunnerConfig.__module__ = "sae_training.config"
    LanguageModelSAERunnerConfig.__qualname__ = "LanguageModelSAERunnerConfig"
    vars(module)["LanguageModelSAERunnerConfig"] = LanguageModelSAERunnerConfig
    package = types.ModuleType("sae_training")
    vars(package)["config"] = module
    monkeypatch.setitem(sys.modules, "sae_training", package)
    monkeypatch.setitem(sys.modules, "sae_training.config", module)
    return LanguageModelSAERunnerConfig


def save_reference(path, configuration, **changed):
    config = configuration()
    config.__dict__.update(
        {
            "model_name": "gpt2-small",
            "hook_point": "blocks.1.mlp.hook_in",
            "out_hook_point": "blocks.1.mlp.hook_out",
            "is_transcoder": True,
            "dtype": torch.float32,
            "device": torch.device("cuda"),
            "use_ghost_grads": (False,),
            "l1_coefficient": np.float64(1.4e-4),
            **changed,
        }
    )
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,), "b_dec_out": (8,)}
    state = OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())
    vars(state)["_metadata"] = {"": {"version": 1}}
    torch.save({"cfg": config, "state_dict": state}, path)
    return state


def test_a_reference_checkpoint_computes_the_reference_s_formula(tmp_path, cache, configuration, monkeypatch):
    state = save_reference(tmp_path / "t.pt", configuration)
    monkeypatch.delitem(sys.modules, "sae_training.config")
    monkeypatch.delitem(sys.modules, "sae_training")
    result = take("reference", tmp_path / "t.pt", cache, tmp_path / "back")
    acts = ((INPUTS - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    again = load_transcoder(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), acts, **CLOSE)
    torch.testing.assert_close(again(INPUTS), acts @ state["W_dec"] + state["b_dec_out"], **CLOSE)
    assert "sae_training" not in sys.modules
    facts = TranscoderManifest.read(tmp_path / "back").as_json()["origin"]["facts"]
    assert facts["use_ghost_grads"] == [False]
    assert facts["l1_coefficient"] == pytest.approx(1.4e-4)
    assert any("processing compatibility, the cache holds raw" in note for note in result.notes)
    assert any("name the model gpt2-small" in note for note in result.notes)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, cache, configuration):
    save_reference(tmp_path / "t.pt", configuration, wandb_entity=Trap(tmp_path / "sprung"))
    with pytest.raises(ArtifactMismatch, match=r"open.* to be loaded, which no such checkpoint needs"):
        take("reference", tmp_path / "t.pt", cache, tmp_path / "back")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_whose_pickle_holds_nothing_is_refused(tmp_path, cache):
    with zipfile.ZipFile(tmp_path / "t.pt", "w") as file:
        file.writestr("t/data.pkl", b"\x80\x02.")
        file.writestr("t/version", "3")
    with pytest.raises(ArtifactCorrupt, match="cannot be read as a checkpoint"):
        take("reference", tmp_path / "t.pt", cache, tmp_path / "back")


def test_files_that_hold_something_else_are_refused(tmp_path, cache, configuration):
    (tmp_path / "t.pkl").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ArtifactMismatch, match="holds nothing; wanted cfg and state_dict"):
        take("reference", tmp_path / "t.pkl", cache, tmp_path / "back")
    (tmp_path / "bytes.pkl").write_bytes(b"no pickle at all")
    with pytest.raises(ArtifactCorrupt, match="cannot be read as a checkpoint"):
        take("reference", tmp_path / "bytes.pkl", cache, tmp_path / "back")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ArtifactMismatch, match="holds weights; wanted cfg and state_dict"):
        take("reference", tmp_path / "other.pt", cache, tmp_path / "back")
    with pytest.raises(ArtifactMissing, match="nothing to import"):
        take("reference", tmp_path / "none.pt", cache, tmp_path / "back")
