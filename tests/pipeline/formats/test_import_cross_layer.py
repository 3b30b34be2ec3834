"""Cross-layer transcoders from circuit-tracer's files compute what those say, and are evaluated like trained ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.formats import export, import_transcoder
from tailrace.pipeline.formats.import_transcoder import ImportResult
from tailrace.pipeline.formats.settings import ExportSettings, ImportSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.training.architectures.manifest import CrossLayerManifest
from tailrace.training.cross_layer.layers import load_cross_layer
from tailrace.training.rows.batches import iter_sites_once
from tests.support.cache_jobs import command, model_folder, run_cache
from tests.support.cross_layer_transcoders import (
    D_SAE,
    INPUTS,
    N_LAYERS,
    by_their_formula,
    publish_cross_layer,
    random_cross_layer,
)
from tests.support.layered_transcoders import MODEL, mlp_site, publish_site_cache

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SITES = [mlp_site(layer) for layer in range(N_LAYERS)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imports") / "cache"
    return publish_site_cache(path, SITES[::-1], model={**MODEL, "n_layers": N_LAYERS})


def take(source: Path, cache: Path, output: Path, **settings: Any) -> ImportResult:
    return import_transcoder.run(
        ImportSettings(**settings), source=source, origin="circuit-tracer", cache=cache, output=output
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random transcoder as another tool has it."""
    publish_cross_layer(tmp_path / "ours", random_cross_layer())
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "ours"], output=tmp_path / "theirs")
    (tmp_path / "theirs/manifest.json").unlink()
    return tmp_path / "theirs"


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) leave out tensors of a file."""
    kept = {name: value for name, value in load_file(path).items() if name not in tensors}
    save_file({**kept, **{name: value for name, value in tensors.items() if value is not None}}, path)


@pytest.mark.parametrize("relu", [False, True])
def test_a_round_trip_changes_nothing(tmp_path: Path, cache: Path, relu: bool) -> None:
    module = random_cross_layer(relu=relu)
    publish_cross_layer(tmp_path / "ours", module)
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "ours"], output=tmp_path / "theirs")
    result = take(tmp_path / "theirs", cache, tmp_path / "back")
    assert (result.sites, result.d_sae) == (["layer0", "layer1", "layer2"], D_SAE)
    again = load_cross_layer(tmp_path / "back")
    torch.testing.assert_close(again.encode(INPUTS), module.encode(INPUTS), **CLOSE)
    torch.testing.assert_close(again(INPUTS), module(INPUTS), **CLOSE)
    assert verify_artifact(tmp_path / "back", "cross_layer_transcoder") == []
    recorded = CrossLayerManifest.read(tmp_path / "back").as_json()["architecture"]
    # as the files say, without our settings of training
    assert recorded == ({"kind": "relu", "input_bias": False} if relu else {"kind": "jumprelu"})
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "back"], output=tmp_path / "twice")
    torch.testing.assert_close(by_their_formula(tmp_path / "twice", INPUTS), module(INPUTS), **CLOSE)


def test_decoder_rows_of_any_length_in_half_precision_are_kept_as_they_are(tmp_path: Path, cache: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    source = tmp_path / "clt"
    source.mkdir()
    for layer in range(N_LAYERS):
        shapes = {"W_enc": (D_SAE, 8), "b_enc": (D_SAE,), "b_dec": (8,)}
        encoder = {f"{name}_{layer}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        decoder = torch.randn(D_SAE, N_LAYERS - layer, 8, generator=generator) * 5
        save_file({name: value.bfloat16() for name, value in encoder.items()}, source / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": decoder.bfloat16()}, source / f"W_dec_{layer}.safetensors")
    for path in source.glob("*.safetensors"):  # for the formula, in float32
        (tmp_path / "exact").mkdir(exist_ok=True)
        save_file({name: value.float() for name, value in load_file(path).items()}, tmp_path / "exact" / path.name)
    take(source, cache, tmp_path / "back", site="layer0, layer1, layer2")
    again = load_cross_layer(tmp_path / "back")
    torch.testing.assert_close(again(INPUTS), by_their_formula(tmp_path / "exact", INPUTS), rtol=1e-5, atol=1e-3)
    written = load_file(source / "W_dec_0.safetensors")["W_dec_0"].float()
    assert torch.equal(again.decoder(0), written.flatten(1))


def test_an_import_records_its_model_sites_origin_and_how_well_each_layer_fits(
    tmp_path: Path, folder: Path, cache: Path
) -> None:
    result = take(folder, cache, tmp_path / "back")
    manifest = CrossLayerManifest.read(tmp_path / "back")
    assert manifest.model == {**MODEL, "n_layers": N_LAYERS}
    assert [site.hook_in for site in manifest.sites] == [f"blocks.{layer}.mlp.hook_in" for layer in range(3)]
    assert manifest.as_json()["origin"]["facts"]["feature_input_hook"] == "mlp.hook_in"
    assert len(manifest.as_json()["inputs"]["imported"]) == 2 * N_LAYERS + 1
    module = load_cross_layer(tmp_path / "ours")
    (rows,) = iter_sites_once(open_cache(cache).split("heldout"), SITES, batch_rows=1024)
    inputs = torch.cat([rows[site.name].inputs for site in SITES], 1)
    acts = module.encode(inputs)
    outputs = module.decode(acts).unflatten(1, (N_LAYERS, -1))
    for layer, site in enumerate(SITES):
        targets = rows[site.name].outputs.double()
        error = (outputs[:, layer].double() - targets).square().sum()
        assert result.fvu[layer] == pytest.approx(float(error / (targets - targets.mean(0)).square().sum()), rel=1e-4)
        assert result.l0[layer] == pytest.approx(float((acts[:, module.of_layer(layer)] > 0).sum(1).double().mean()))
    assert [layer["site"] for layer in manifest.layers] == ["layer0", "layer1", "layer2"]
    assert any("no better than a constant's in 3 of 3 layers" in note for note in result.notes)  # weights are random
    assert summarise(tmp_path / "back")["imported from"] == "circuit-tracer"
    assert take(folder, cache, tmp_path / "back") == result


# What is refused


def test_every_tensor_that_does_not_fit_is_told_at_once(tmp_path: Path, folder: Path, cache: Path) -> None:
    change(folder / "W_enc_1.safetensors", b_dec_1=None, W_skip_1=torch.zeros(8, 8))
    change(folder / "W_dec_2.safetensors", W_dec_2=torch.zeros(8, D_SAE))
    with pytest.raises(ArtifactMismatch) as refused:
        take(folder, cache, tmp_path / "back")
    for reason in (
        "W_enc_1.safetensors has no b_dec_1",
        "W_skip_1, which would be ignored",
        "W_dec_2 has shape (8, 24), wanted (24, 1, 8)",
    ):
        assert reason in str(refused.value)
    assert not (tmp_path / "back").exists()


def test_layers_that_are_not_there_are_told(tmp_path: Path, folder: Path, cache: Path) -> None:
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(ArtifactMissing, match=r"has no W_dec_1\.safetensors;"):
        take(folder, cache, tmp_path / "back")
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(ArtifactMissing, match=r"has no W_enc_1\.safetensors, W_dec_1\.safetensors;"):
        take(folder, cache, tmp_path / "back")
    for path in folder.glob("W_*_2.safetensors"):
        path.unlink()
    with pytest.raises(ArtifactMissing, match="W_dec_0 writes to 3 layers, the files are of 1"):
        take(folder, cache, tmp_path / "back")


def test_broken_numbers_and_negative_thresholds_are_refused(tmp_path: Path, folder: Path, cache: Path) -> None:
    change(folder / "W_enc_0.safetensors", threshold_0=torch.full((D_SAE,), -1.0))
    with pytest.raises(ArtifactMismatch, match="24 thresholds are below zero"):
        take(folder, cache, tmp_path / "back")
    change(folder / "W_enc_0.safetensors", threshold_0=torch.full((D_SAE,), torch.nan))
    change(folder / "W_dec_1.safetensors", W_dec_1=torch.full((D_SAE, 2, 8), torch.inf))
    with pytest.raises(ArtifactCorrupt, match="threshold_0, W_dec_1 hold NaN or infinity"):
        take(folder, cache, tmp_path / "back")
    (folder / "W_enc_2.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactCorrupt, match=r"W_enc_2\.safetensors: cannot be read as safetensors"):
        take(folder, cache, tmp_path / "back")


def test_folders_of_other_kinds_are_refused_with_what_to_give(tmp_path: Path, folder: Path, cache: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model_kind": "transcoder_set"}))
    with pytest.raises(ArtifactMismatch, match=r"is a transcoder_set; .* such as .*layer_0\.safetensors"):
        take(folder, cache, tmp_path / "back")
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "transcoders": ["layer_0"]}))
    with pytest.raises(ArtifactMismatch, match="another layout"):
        take(folder, cache, tmp_path / "back")


def test_sites_that_are_not_there_or_not_told_are_refused(tmp_path: Path, folder: Path, cache: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "feature_input_hook": "hook_resid_mid"}))
    with pytest.raises(ArtifactMismatch, match=r"--hooks blocks\.0\.hook_resid_mid:blocks\.0\.mlp\.hook_out and so on"):
        take(folder, cache, tmp_path / "back")
    (folder / "config.yaml").unlink()
    with pytest.raises(SettingsError, match="does not say which hooks it belongs to; name 3 sites"):
        take(folder, cache, tmp_path / "back")
    with pytest.raises(SettingsError, match=r"no 'layer7'; 2 sites are named, the files are of 3 layers"):
        take(folder, cache, tmp_path / "back", site="layer0,layer7")
    with pytest.raises(SettingsError, match="of layers 1, 0, 2; each is wanted once, lowest first"):
        take(folder, cache, tmp_path / "back", site="layer1,layer0,layer2")
    assert take(folder, cache, tmp_path / "back", site="layer0,layer1,layer2").sites == ["layer0", "layer1", "layer2"]


def test_sites_of_another_width_are_refused(tmp_path: Path, folder: Path) -> None:
    narrow = publish_site_cache(tmp_path / "narrow", [mlp_site(layer, 6, 6) for layer in range(N_LAYERS)])
    with pytest.raises(ArtifactMismatch, match=r"maps width 8 to 8, but of .* layer0 holds 6 and 6; layer1"):
        take(folder, narrow, tmp_path / "back")


# In use


def test_one_that_reads_the_stream_is_evaluated_on_its_model_and_traced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As circuit-tracer's own usually do: from hook_resid_mid to hook_mlp_out."""
    pairs = [f"blocks.{layer}.hook_resid_mid:blocks.{layer}.hook_mlp_out" for layer in range(2)]
    run_cache(tmp_path / "cache", layers=None, hooks=pairs)
    opened = open_cache(tmp_path / "cache")
    module = random_cross_layer(width=16, n_layers=2)
    sites: list[Site] = list(opened.sites.values())
    publish_cross_layer(tmp_path / "ours", module, sites, model=opened.manifest.model)
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "ours"], output=tmp_path / "theirs")
    told = ("import", tmp_path / "theirs", "--from", "circuit-tracer", "--cache", tmp_path / "cache")
    answer = command(capsys, *told, "--out", tmp_path / "back")
    assert answer.code == 0, answer.err
    assert f"{tmp_path / 'back'}: {D_SAE} features in each of 2 layers, L0 " in answer.out
    scores = [
        evaluate.run(
            EvaluateSettings(contexts=3, contexts_per_batch=3),
            transcoders=[tmp_path / name],
            cache=tmp_path / "cache",
            output=tmp_path / f"{name}-evaluation",
            compute=Compute(threads=1, quiet=True),
        ).scores["all sites"]
        for name in ("ours", "back")
    ]
    assert scores[1].spliced.ce == pytest.approx(scores[0].spliced.ce, rel=1e-5)
    assert scores[0].spliced.kl > 1e-3  # it does something there
    circuit = traced(tmp_path / "back", tmp_path / "circuit")
    assert circuit["root"]["incompleteness"] < 1e-5
    assert features_of(circuit)


def test_one_of_whole_mlps_is_traced_like_the_one_it_was_exported_from(tmp_path: Path) -> None:
    run_cache(tmp_path / "cache", layers="all")
    opened = open_cache(tmp_path / "cache")
    module = random_cross_layer(width=16, n_layers=2)
    publish_cross_layer(tmp_path / "ours", module, list(opened.sites.values()), model=opened.manifest.model)
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "ours"], output=tmp_path / "theirs")
    take(tmp_path / "theirs", tmp_path / "cache", tmp_path / "back")
    ours, back = (traced(tmp_path / name, tmp_path / f"{name}-circuit") for name in ("ours", "back"))
    assert back["root"]["incompleteness"] < 1e-5
    assert features_of(back) == features_of(ours) != set()


def traced(transcoder: Path, output: Path) -> dict[str, Any]:
    words = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    known = sorted(words, key=lambda word: words[word])
    return circuit.run(
        CircuitSettings(iterations=2, branches=6, max_features=20),
        Question(" ".join(known[2:9]), logit=known[10]),
        transcoders=[transcoder],
        output=output,
        model=str(model_folder()),
        compute=Compute(threads=1),
    ).document


def features_of(document: dict[str, Any]) -> set[tuple[int, int, int]]:
    """Layer, token and number of every feature in a circuit's graph."""
    nodes = document["attribution_graph"]["nodes"]
    return {(one["layer"], one["token"], one["index"]) for one in nodes if one["kind"] == "feature"}
