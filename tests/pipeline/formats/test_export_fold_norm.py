"""A transcoder with the norm folded in computes from before the norm's gain what it computed from after it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.model.language_model import SiteHooks, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import JumpReLU, ReLU
from tests.support.layered_transcoders import publish_transcoder, random_transcoder
from tests.support.tiny_models import save_tiny_model

D_MODEL = 16


def publish_layers(path, model, n_layers, **changed):
    modules, paths = [], []
    for layer in range(n_layers):
        block = f"blocks.{layer}.mlp"
        site = Site(f"layer{layer}", f"{block}.hook_in", f"{block}.hook_out", D_MODEL, D_MODEL, "float32")
        modules.append(random_transcoder(JumpReLU(skip=True), site, seed=layer))
        identity = {**model.identity(), **changed}
        paths.append(publish_transcoder(path / f"t{layer}", modules[-1], JumpReLU(skip=True), site, model=identity))
    return modules, paths


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_on_a_model_s_own_activations_the_folded_set_writes_the_same(tmp_path, family):
    folder = save_tiny_model(tmp_path / "model", family)
    model = load_language_model(ModelSettings(model=str(folder)))
    modules, paths = publish_layers(tmp_path, model, model.n_layers)
    result = export.run(
        ExportSettings(fold_norm=True),
        to="circuit-tracer",
        sources=paths,
        output=tmp_path / "out",
        model=str(folder),
    )
    # of a LayerNorm, TransformerLens 2 has the same hook after the gain
    releases, *norms, name = result.notes
    assert "from 0.4 on" in releases
    assert "CIRCUIT_TRACER_CACHE_DIR" in releases
    assert [note.split(" ")[0] for note in norms] == (["ln2.hook_normalized:"] if family == "gpt2" else [])
    assert all("Without --fold-norm the set holds under all" in note for note in norms)
    assert "after a folder of this machine" in name
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config.get("transformer_lens") == (">=3" if family == "gpt2" else None)
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("ln2.hook_normalized", "hook_mlp_out")
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    for layer, module in enumerate(modules):
        block = f"blocks.{layer}"
        after = SiteHooks("after", f"{block}.mlp.hook_in", f"{block}.mlp.hook_out")
        before = SiteHooks("before", f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out")
        held = {name: value.clone() for name, value in model.capture(tokens, [after, before]).items()}
        # what the set replaces is what the transcoder was trained to write
        torch.testing.assert_close(held[before.hook_out], held[after.hook_out], rtol=0, atol=0)
        tensors = load_file(tmp_path / f"out/layer_{layer}.safetensors")
        inputs = held[before.hook_in].float()
        pre = inputs @ tensors["W_enc"].T + tensors["b_enc"]
        acts = pre * (pre > tensors["activation_function.threshold"])
        outputs = acts @ tensors["W_dec"] + tensors["b_dec"] + inputs @ tensors["W_skip"].T
        torch.testing.assert_close(outputs, module(held[after.hook_in].float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folded_saelens_export_says_how_to_load_the_model_for_every_release(tmp_path, family):
    # with fold_ln, TransformerLens 2 and 3 both have ln2.hook_normalized before the gain, which is folded away
    folder = save_tiny_model(tmp_path / "model", family)
    model = load_language_model(ModelSettings(model=str(folder)))
    _, (path,) = publish_layers(tmp_path, model, 1)
    settings = ExportSettings(fold_norm=True)
    result = export.run(settings, to="saelens", sources=[path], output=tmp_path / "out", model=str(folder))
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.0.ln2.hook_normalized"
    asked = {"fold_ln": True} if family == "gpt2" else {}
    assert metadata["model_from_pretrained_kwargs"] == asked
    assert any("model_from_pretrained_kwargs of its metadata: fold_ln" in note for note in result.notes) == bool(asked)


def test_a_model_with_a_norm_after_its_mlp_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "gemma2")
    model = load_language_model(ModelSettings(model=str(folder)))
    _, paths = publish_layers(tmp_path, model, 1)
    with pytest.raises(SettingsError, match="has a norm after the MLP"):
        export.run(
            ExportSettings(fold_norm=True), to="saelens", sources=paths, output=tmp_path / "out", model=str(folder)
        )


def test_a_site_without_a_norm_has_none_to_fold(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "gpt2")
    model = load_language_model(ModelSettings(model=str(folder)))
    hook = "blocks.0.hook_resid_post"
    site = Site(hook, hook, hook, D_MODEL, D_MODEL, "float32")
    publish_transcoder(tmp_path / "t", random_transcoder(ReLU(), site), ReLU(), site, model=model.identity())
    with pytest.raises(SettingsError, match="has a norm to fold in; leave out --fold-norm"):
        export.run(
            ExportSettings(fold_norm=True),
            to="saelens",
            sources=[tmp_path / "t"],
            output=tmp_path / "out",
            model=str(folder),
        )
