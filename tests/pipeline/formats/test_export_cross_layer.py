"""Cross-layer transcoders in circuit-tracer's files compute the same by its formula; no other format can hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.export import ExportResult
from tailrace.pipeline.formats.settings import ExportSettings, Format
from tailrace.pipeline.model.language_model import SiteHooks, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactIncomplete, ArtifactMismatch, SettingsError, StorageFull
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import write_tensors
from tests.support.cache_jobs import command
from tests.support.cross_layer_transcoders import (
    D_SAE,
    INPUTS,
    N_LAYERS,
    by_their_formula,
    publish_cross_layer,
    random_cross_layer,
)
from tests.support.layered_transcoders import MODEL, WIDTH, mlp_site, publish_transcoder, random_transcoder
from tests.support.tiny_models import save_tiny_model

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # one rounding of float32 per product of width 8 and 24


def write(to: Format, sources: Sequence[Path], output: Path, **settings: Any) -> ExportResult:
    return export.run(ExportSettings(**settings), to=to, sources=sources, output=output)


@pytest.mark.parametrize("relu", [False, True])
def test_an_exported_folder_computes_the_same_in_every_layer(tmp_path: Path, relu: bool) -> None:
    module = random_cross_layer(relu=relu)
    publish_cross_layer(tmp_path / "t", module)
    result = write("circuit-tracer", [tmp_path / "t"], tmp_path / "out", scan="me/clt")
    assert result.files == sorted(
        ["config.yaml", *(f"W_{side}_{layer}.safetensors" for side in ("dec", "enc") for layer in range(N_LAYERS))]
    )
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text()) == {
        "model_name": "tiny-gpt2",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "me/clt",
    }
    assert load_file(tmp_path / "out/W_dec_1.safetensors")["W_dec_1"].shape == (D_SAE, N_LAYERS - 1, WIDTH)
    assert ("threshold_0" in load_file(tmp_path / "out/W_enc_0.safetensors")) is not relu
    torch.testing.assert_close(by_their_formula(tmp_path / "out", INPUTS), module(INPUTS), **CLOSE)
    assert verify_artifact(tmp_path / "out", "export") == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_the_norm_folded_in_it_computes_the_same_from_before_the_gain(tmp_path: Path, family: str) -> None:
    folder, width = save_tiny_model(tmp_path / "model", family), 16
    model = load_language_model(ModelSettings(model=str(folder)))
    module = random_cross_layer(width=width, n_layers=model.n_layers)
    sites = [mlp_site(layer, width, width) for layer in range(model.n_layers)]
    publish_cross_layer(tmp_path / "t", module, sites, model=model.identity())
    export.run(
        ExportSettings(fold_norm=True),
        to="circuit-tracer",
        sources=[tmp_path / "t"],
        output=tmp_path / "out",
        model=str(folder),
    )
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("ln2.hook_normalized", "hook_mlp_out")
    hooks = [
        SiteHooks(f"{name}{layer}", f"blocks.{layer}.{read}", f"blocks.{layer}.mlp.hook_out")
        for layer in range(model.n_layers)
        for name, read in (("after", "mlp.hook_in"), ("before", "ln2.hook_normalized"))
    ]
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    held = {name: value.clone().flatten(0, 1).float() for name, value in model.capture(tokens, hooks).items()}
    after = torch.cat([held[f"blocks.{layer}.mlp.hook_in"] for layer in range(model.n_layers)], 1)
    before = torch.cat([held[f"blocks.{layer}.ln2.hook_normalized"] for layer in range(model.n_layers)], 1)
    assert float((after - before).abs().max()) > 0.1  # the gain is not 1
    torch.testing.assert_close(by_their_formula(tmp_path / "out", before), module(after), rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_all_of_the_models_are_refused_with_what_to_do(tmp_path: Path) -> None:
    publish_cross_layer(tmp_path / "t", random_cross_layer(), model={**MODEL, "n_layers": 5})
    with pytest.raises(SettingsError) as refused:
        write("circuit-tracer", [tmp_path / "t"], tmp_path / "out")
    assert "layer 3, 4: " in str(refused.value)
    assert "does not read it; circuit-tracer replaces the MLP of every layer, from 0 to 4" in str(refused.value)
    assert "--layers all" in str(refused.value)
    assert not (tmp_path / "out").exists()
    later = [mlp_site(layer) for layer in (1, 2, 3)]
    publish_cross_layer(tmp_path / "later", random_cross_layer(), later, model={**MODEL, "n_layers": 3})
    with pytest.raises(SettingsError, match=r"layer 0: .* does not read it"):
        write("circuit-tracer", [tmp_path / "later"], tmp_path / "out")


def test_everything_about_its_sites_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    folded = {**MODEL, "processing": "compatibility", "n_layers": 3}
    crossing = Site("crossing", "blocks.0.hook_resid_mid", "blocks.1.mlp.hook_out", 8, 8, "float32")
    other = Site("other", "blocks.2.hook_resid_mid", "blocks.2.mlp.hook_out", 8, 8, "float32")
    publish_cross_layer(tmp_path / "t", random_cross_layer(), [mlp_site(0), crossing, other], model=folded)
    with pytest.raises(SettingsError) as refused:
        write("circuit-tracer", [tmp_path / "t"], tmp_path / "out")
    for reason in (
        "reads blocks.0.hook_resid_mid and writes blocks.1.mlp.hook_out",
        "input hook: is hook_resid_mid, mlp.hook_in in one set",
        "processing compatibility",
    ):
        assert str(refused.value).count(reason) == 1, reason


@pytest.mark.parametrize("to", ["saelens", "sparsify", "circuit-tracer-features"])
def test_other_formats_refuse_it_and_name_the_one_that_can_hold_it(tmp_path: Path, to: Format) -> None:
    publish_cross_layer(tmp_path / "t", random_cross_layer())
    with pytest.raises((SettingsError, ArtifactMismatch), match="--to circuit-tracer"):
        write(to, [tmp_path / "t"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_exported_alone(tmp_path: Path) -> None:
    publish_cross_layer(tmp_path / "t", random_cross_layer())
    publish_transcoder(tmp_path / "one", random_transcoder(JumpReLU(), mlp_site(0)), JumpReLU(), mlp_site(0))
    with pytest.raises(SettingsError, match="a cross-layer transcoder is all layers by itself; export it alone"):
        write("circuit-tracer", [tmp_path / "one", tmp_path / "t"], tmp_path / "out")


def test_an_interrupted_export_is_nothing_to_its_reader_and_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_cross_layer(tmp_path / "t", random_cross_layer())

    def fail_at_the_second(path: Path, tensors: dict[str, Tensor]) -> None:
        if path.name == "W_enc_1.safetensors":
            raise StorageFull("full")
        write_tensors(path, tensors)

    monkeypatch.setattr("tailrace.pipeline.formats.circuit_tracer.write_tensors", fail_at_the_second)
    with pytest.raises(StorageFull):
        write("circuit-tracer", [tmp_path / "t"], tmp_path / "out")
    assert not (tmp_path / "out/config.yaml").exists()
    with pytest.raises(ArtifactIncomplete):
        export.read_result(tmp_path / "out")
    monkeypatch.undo()
    assert len(write("circuit-tracer", [tmp_path / "t"], tmp_path / "out").files) == 2 * N_LAYERS + 1


def test_what_wants_one_layer_or_tables_says_what_can_be_done_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_cross_layer(tmp_path / "t", random_cross_layer())
    with pytest.raises(ArtifactMismatch) as refused:
        TranscoderManifest.read(tmp_path / "t")
    answer = command(capsys, "dashboard", tmp_path / "t", "--out", tmp_path / "out")
    assert answer.code != 0
    assert not (tmp_path / "out").exists()
    assert "holds a cross_layer_transcoder, wanted a transcoder;" in str(refused.value)
    assert "holds a cross_layer_transcoder, wanted tables;" in answer.err
    for said in ("is of one layer", "pipeline analyze", "pipeline export --to circuit-tracer"):
        assert said in str(refused.value)
        assert said in answer.err
