"""Exported transcoders compute, by the other tool's formula, what they computed here; what does not fit is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.saelens import TrainedOn, trained_on
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import CacheReference, Inputs, verify_artifact
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactIncomplete, ArtifactMismatch, ArtifactMissing, SettingsError, StorageFull
from tailrace.training.architectures import BatchTopK, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.transcoder import write_tensors
from tests.support.layered_transcoders import (
    MODEL,
    mlp_site,
    publish_site_cache,
    publish_transcoder,
    random_transcoder,
    sae_site,
)

INPUTS = torch.randn(200, 8, generator=torch.Generator().manual_seed(5))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # one rounding of float32 per product of width 8 and 24


def published(path, architecture, site, *, model=MODEL, d_sae=24, seed=0):
    module = random_transcoder(architecture, site, d_sae, seed)
    return publish_transcoder(path, module, architecture, site, model=model), module


def write(to, sources, output, cache=None, **settings):
    return export.run(ExportSettings(**settings), to=to, sources=sources, output=output, cache=cache)


@pytest.mark.parametrize(
    ("architecture", "site", "name"),
    [
        (ReLU(), mlp_site(1, 8, 5), "transcoder"),
        (ReLU(skip=True), mlp_site(1, 8, 5), "skip_transcoder"),
        (JumpReLU(), mlp_site(1), "jumprelu_transcoder"),
        (BatchTopK(skip=True), mlp_site(1), "jumprelu_skip_transcoder"),
        (Gated(), mlp_site(1), "jumprelu_transcoder"),
        (ReLU(), sae_site(1), "standard"),
        (JumpReLU(), sae_site(1), "jumprelu"),
    ],
)
def test_a_saelens_folder_computes_the_same(tmp_path, architecture, site, name):
    path, module = published(tmp_path / "t", architecture, site)
    result = write("saelens", [path], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    pre = INPUTS @ tensors["W_enc"] + tensors["b_enc"]
    acts = pre.relu() * (pre > tensors["threshold"]) if "threshold" in tensors else pre.relu()
    outputs = acts @ tensors["W_dec"] + tensors["b_dec"]
    if "W_skip" in tensors:
        outputs = outputs + INPUTS @ tensors["W_skip"].T
    torch.testing.assert_close(acts, module.encode(INPUTS), **CLOSE)
    torch.testing.assert_close(outputs, module(INPUTS), **CLOSE)
    assert config["architecture"] == name
    assert ("threshold" in tensors) == ("jumprelu" in name)
    assert config["apply_b_dec_to_input"] is False
    assert config["metadata"]["sae_lens_version"]
    # what SAELens' usual class calls the MLP's input and output; it passes over hooks of any other name
    assert config["metadata"]["hook_name"] == (
        "blocks.1.hook_mlp_out" if site == sae_site(1) else "blocks.1.mlp.hook_in"
    )
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert result.files == ["cfg.json", "sae_weights.safetensors"]
    assert verify_artifact(tmp_path / "out", "export") == []


def test_a_topk_autoencoder_keeps_its_k_in_saelens(tmp_path):
    path, module = published(tmp_path / "t", TopK(k=3), sae_site(0))
    result = write("saelens", [path], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (config["architecture"], config["k"], result.costs) == ("topk", 3, [])
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert sorted(tensors) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    torch.testing.assert_close(tensors["W_enc"].T, module.W_enc)


def hooks_written(tmp_path, model, *hooks, architecture=None):
    """Export a transcoder of ``hooks`` to SAELens; return the hooks that it names, and the notes."""
    site = Site("here", hooks[0], hooks[-1], 8, 8, "float32")
    path, _ = published(tmp_path / "t", architecture or ReLU(), site, model={**MODEL, **model})
    result = write("saelens", [path], tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    return (metadata["hook_name"], metadata["hook_name_out"]), result.notes


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (
            "Gemma2ForCausalLM",
            "has none: in Gemma2ForCausalLM a norm follows, and blocks.1.hook_mlp_out comes after it",
        ),
        ("UnheardOf", "may have none: whether a norm follows in UnheardOf is not known here"),
    ],
)
def test_where_a_norm_may_follow_the_mlp_saelens_is_given_the_true_hook_and_the_user_is_told(
    tmp_path, architecture, reason
):
    hooks = ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    written, notes = hooks_written(tmp_path, {"architecture": architecture}, *hooks)
    assert written == hooks
    assert notes[0].startswith(f"here: blocks.1.mlp.hook_out: HookedSAETransformer {reason}")
    assert "attach this one in SAETransformerBridge" in notes[0]


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
        ("embed.hook_out", "hook_embed"),
    ],
)
def test_an_autoencoder_of_another_place_is_named_as_saelens_has_it_and_needs_no_other_class(tmp_path, hook, name):
    written, notes = hooks_written(tmp_path, {}, hook)
    assert written == (name, name)
    reads, lacks = notes
    assert reads == "here: read by SAELens from 6.0 on"
    assert "the files lack the length of contexts" in lacks


@pytest.mark.parametrize(
    ("hook", "reshaped", "head"),
    [
        ("blocks.1.attn.hook_z", "hook_z", None),
        ("blocks.1.attn.o.hook_in", "hook_z", None),
        ("blocks.1.attn.hook_z[1]", "none", 1),
        ("blocks.1.hook_resid_pre", "none", None),
    ],
)
def test_attention_is_written_as_saelens_lays_out_its_heads(tmp_path, hook, reshaped, head):
    written, _ = hooks_written(tmp_path, {}, hook)
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert written[0] == ("blocks.1.hook_resid_pre" if "resid" in hook else "blocks.1.attn.hook_z")
    assert (config["reshape_activations"], config["metadata"]["hook_head_index"]) == (reshaped, head)


def test_queries_that_saelens_cannot_lay_side_by_side_are_told(tmp_path):
    _, notes = hooks_written(tmp_path, {}, "blocks.1.attn.hook_q")
    assert any("flatten the last two dimensions yourself" in note for note in notes)


def test_what_was_trained_on_is_in_the_metadata_where_the_cache_says_it(tmp_path):
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(0)])
    packing = {"context_length": 8, "row_filter": {"exclude": "special", "first_position": 4}}
    opened = open_cache(cache)
    opened.manifest.packing.update(packing)
    opened.manifest.text.update({"source": "hub", "dataset": "some/text"})
    known = CacheReference(**opened.reference)
    assert trained_on(Inputs(cache=known), opened) == TrainedOn(8, 4, True, "some/text")
    other = CacheReference(**{**opened.reference, "cache_id": "another"})
    for inputs in (Inputs(), Inputs(cache=other), Inputs(cache=known, imported={})):
        assert trained_on(inputs, opened) is None
    live = {"packing": {"context_length": 16, "exclude": "bos", "first_position": 0}, "text": {"source": "local"}}
    assert trained_on(Inputs(live=live), None) == TrainedOn(16, 1, False, None)


def test_a_hook_that_saelens_has_under_no_name_is_kept_and_told(tmp_path):
    written, notes = hooks_written(tmp_path, {}, "blocks.1.ln1.hook_out")
    assert written == ("blocks.1.ln1.hook_out", "blocks.1.ln1.hook_out")
    assert "blocks.1.ln1.hook_out: HookedSAETransformer has none that is known to hold the same vectors" in notes[0]


def test_what_saelens_does_not_do_with_a_transcoder_is_told_with_its_releases(tmp_path):
    _, notes = hooks_written(
        tmp_path, {}, "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out", architecture=ReLU(skip=True)
    )
    attach, without, versions, skip, evals, _ = notes
    assert without == (
        "here: HookedTransformer itself has no blocks.1.mlp.hook_in; --fold-norm exports with hooks that it has"
    )
    assert versions == "here: read by SAELens from 6.0 on"
    assert "attach it in HookedSAETransformer of SAELens 6.34 or later, which adds blocks.1.mlp.hook_in" in attach
    assert "leaves out the path past the features" in skip
    assert "SAELens' evals, up to 6.54.12 at least, compare what a transcoder gives with what it reads" in evals


def test_an_export_whose_hooks_saelens_passes_over_is_not_taken_for_one_of_today(tmp_path, monkeypatch):
    path, _ = published(tmp_path / "t", ReLU(), mlp_site(0))
    with monkeypatch.context() as earlier:
        earlier.setattr("tailrace.pipeline.formats.saelens.hook_names", lambda _, hooks: list(hooks))
        write("saelens", [path], tmp_path / "out")
    with pytest.raises(ArtifactMismatch, match="an earlier release wrote it, so that SAELens attaches it nowhere"):
        write("saelens", [path], tmp_path / "out")


def test_a_topk_transcoder_is_written_with_a_threshold_and_its_cost_is_told(tmp_path):
    site = mlp_site(0)
    path, module = published(tmp_path / "t", TopK(k=3), site)
    cache = publish_site_cache(tmp_path / "cache", [site])
    result = write("saelens", [path], tmp_path / "out", cache=cache)
    assert "a threshold per feature stands in for k: L0 " in result.notes[0]
    assert result.costs == result.notes[:1]
    assert (tmp_path / "out/sae_weights.safetensors").stat().st_mode == (tmp_path / "out/cfg.json").stat().st_mode
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (calibration,) = manifest["calibration"]
    pre = INPUTS @ tensors["W_enc"] + tensors["b_enc"]
    assert 0 < int((pre > tensors["threshold"]).sum()) < int((pre > 0).sum())
    assert calibration["fvu_after"] != calibration["fvu_before"]
    torch.testing.assert_close(pre, module.pre_activations(INPUTS), **CLOSE)


def test_topk_without_a_cache_is_refused_and_leaves_nothing_behind(tmp_path):
    path, _ = published(tmp_path / "t", TopK(k=3), mlp_site(0))
    with pytest.raises(SettingsError, match="give --cache"):
        write("saelens", [path], tmp_path / "out")
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(0)])
    assert write("saelens", [path], tmp_path / "out", cache=cache).notes


def test_a_cache_of_another_model_calibrates_nothing(tmp_path):
    path, _ = published(tmp_path / "t", TopK(k=3), mlp_site(0))
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(0)], model={**MODEL, "name": "other"})
    with pytest.raises(ArtifactMismatch, match="other"):
        write("saelens", [path], tmp_path / "out", cache=cache)


def test_a_circuit_tracer_set_computes_the_same_in_every_layer_whatever_their_order(tmp_path):
    kinds = [JumpReLU(), ReLU()]
    made = [published(tmp_path / f"t{layer}", kinds[layer], mlp_site(layer), seed=layer) for layer in (0, 1)]
    result = write("circuit-tracer", [made[1][0], made[0][0]], tmp_path / "out", scan="me/set")
    assert result.files == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == {
        "model_name": "tiny-gpt2",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "me/set",
    }
    for layer, (_, module) in enumerate(made):
        tensors = load_file(tmp_path / "out" / f"layer_{layer}.safetensors")
        pre = INPUTS @ tensors["W_enc"].T + tensors["b_enc"]
        threshold = tensors.get("activation_function.threshold")
        acts = pre.relu() if threshold is None else pre * (pre > threshold)
        torch.testing.assert_close(acts @ tensors["W_dec"] + tensors["b_dec"], module(INPUTS), **CLOSE)
    assert tensors.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}  # of the last layer, which has ReLU
    assert write("circuit-tracer", [tmp_path], tmp_path / "by-folder").files == result.files


def test_a_set_with_missing_and_unfit_layers_is_refused_with_every_reason(tmp_path):
    folded = {**MODEL, "processing": "compatibility", "n_layers": 4}
    paths = [
        published(tmp_path / "a", ReLU(), mlp_site(1), model=folded)[0],
        published(tmp_path / "b", ReLU(), mlp_site(1), model=folded, d_sae=32)[0],
        published(tmp_path / "c", ReLU(), sae_site(3), model=folded)[0],
    ]
    with pytest.raises(SettingsError) as refused:
        write("circuit-tracer", paths, tmp_path / "out")
    said = str(refused.value)
    for reason in (
        "layer 1: more than one",
        "layer 0, 2: no transcoder was given",
        "d_sae: is 24, 32",
        "is an autoencoder",
        "processing compatibility",
    ):
        assert reason in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", [TopK(k=3), TopK(k=3, skip=True)])
def test_a_sparsify_folder_computes_the_same(tmp_path, architecture):
    path, module = published(tmp_path / "t", architecture, mlp_site(1))
    result = write("sparsify", [path], tmp_path / "out")
    assert result.files == ["h.1.mlp/cfg.json", "h.1.mlp/sae.safetensors"]
    config = json.loads((tmp_path / "out/h.1.mlp/cfg.json").read_text())
    assert (config["k"], config["transcode"], config["num_latents"], config["d_in"]) == (3, True, 24, 8)
    tensors = load_file(tmp_path / "out/h.1.mlp/sae.safetensors")
    pre = (INPUTS @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, features = pre.topk(3)
    outputs = torch.einsum("rk,rkd->rd", values, tensors["W_dec"][features]) + tensors["b_dec"]
    if architecture.skip:
        outputs = outputs + INPUTS @ tensors["W_skip"].mT
    torch.testing.assert_close(outputs, module(INPUTS), **CLOSE)


def test_a_sparsify_autoencoder_takes_its_bias_off_the_input(tmp_path):
    path, module = published(tmp_path / "t", TopK(k=3), sae_site(1))
    write("sparsify", [path], tmp_path / "out", module="layers.1.mlp")
    tensors = load_file(tmp_path / "out/layers.1.mlp/sae.safetensors")
    pre = (INPUTS - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    torch.testing.assert_close(pre, module.pre_activations(INPUTS), **CLOSE)


def test_what_sparsify_cannot_hold_is_told_all_at_once(tmp_path):
    model = {**MODEL, "processing": "compatibility", "architecture": "UnheardOf"}
    path, _ = published(tmp_path / "t", ReLU(), mlp_site(1, 8, 5), model=model)
    with pytest.raises(SettingsError) as refused:
        write("sparsify", [path], tmp_path / "out")
    for reason in ("has TopK only", "width 8 to 5", "processing compatibility", "name it with --module"):
        assert reason in str(refused.value)


def test_a_setting_of_another_format_is_refused(tmp_path):
    path, _ = published(tmp_path / "t", ReLU(), mlp_site(0))
    with pytest.raises(SettingsError, match="--scan: is a setting of circuit-tracer, not of saelens"):
        write("saelens", [path], tmp_path / "out", scan="x")


def test_the_same_export_again_returns_what_is_there_and_another_is_refused(tmp_path):
    path, _ = published(tmp_path / "t", ReLU(), mlp_site(0))
    write("saelens", [path], tmp_path / "out")
    written = (tmp_path / "out" / "cfg.json").stat().st_mtime_ns
    write("saelens", [path], tmp_path / "out")
    assert (tmp_path / "out" / "cfg.json").stat().st_mtime_ns == written
    with pytest.raises(ArtifactMismatch, match="model_name"):
        write("saelens", [path], tmp_path / "out", model_name="gpt2")


def test_nothing_to_export_is_said(tmp_path):
    with pytest.raises(ArtifactMissing, match="no published transcoder"):
        write("saelens", [tmp_path / "nowhere"], tmp_path / "out")


def test_an_interrupted_export_is_nothing_to_its_reader_and_is_finished_by_the_next(tmp_path, monkeypatch):
    paths = [published(tmp_path / f"t{layer}", ReLU(), mlp_site(layer))[0] for layer in (0, 1)]

    def fail_at_the_second(path, tensors):
        if path.name == "layer_1.safetensors":
            raise StorageFull("full")
        write_tensors(path, tensors)

    monkeypatch.setattr("tailrace.pipeline.formats.circuit_tracer.write_tensors", fail_at_the_second)
    with pytest.raises(StorageFull):
        write("circuit-tracer", paths, tmp_path / "out")
    assert not (tmp_path / "out/config.yaml").exists()
    with pytest.raises(ArtifactIncomplete):
        export.read_result(tmp_path / "out")
    monkeypatch.undo()
    assert len(write("circuit-tracer", paths, tmp_path / "out").files) == 3
    assert verify_artifact(tmp_path / "out", "export") == []
