"""The packages themselves load our exports and compute what we do; each runs in an environment of its own.

The environments are made with pip at first use, so these tests run by ``make interop`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailrace.pipeline.formats import export, import_transcoder
from tailrace.pipeline.formats.settings import ExportSettings, ImportSettings
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import BatchTopK, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.cross_layer.layers import load_cross_layer
from tests.support.cross_layer_transcoders import INPUTS as LAYERED_INPUTS
from tests.support.cross_layer_transcoders import N_LAYERS, publish_cross_layer, random_cross_layer
from tests.support.interop import CIRCUIT_TRACER, SAELENS, SAELENS_YEAR_OLD, SPARSIFY, run_in
from tests.support.layered_transcoders import (
    MODEL,
    mlp_site,
    publish_site_cache,
    publish_transcoder,
    random_transcoder,
    sae_site,
)
from tests.support.tables_by_hand import dead_row, example_row, feature_row, publish_tables

pytestmark = pytest.mark.interop

INPUTS = torch.randn(200, 8, generator=torch.Generator().manual_seed(5))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

LOAD_SAELENS = """
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
given = json.loads(sys.argv[1])
inputs = load_file(given["inputs"])["inputs"]
for place in given["folders"]:
    coder = SAE.load_from_disk(place)
    acts = coder.encode(inputs)
    outputs = coder(inputs)
    assert coder.cfg.metadata.hook_name == given["hook_name"][place], coder.cfg.metadata.hook_name
    save_file({"acts": acts.detach().contiguous(), "outputs": outputs.detach().contiguous()}, place + "/theirs")
    coder.save_model(place + "-again")
"""
LOAD_SPARSIFY = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
given = json.loads(sys.argv[1])
inputs = load_file(given["inputs"])["inputs"]
for root in given["folders"]:
    for name, coder in SparseCoder.load_many(root, local=True).items():
        acts, features, _ = coder.encode(inputs)
        dense = torch.zeros(len(inputs), coder.num_latents).scatter_(1, features, acts)
        outputs = coder.decode(acts, features)
        if coder.W_skip is not None:
            outputs = outputs + inputs @ coder.W_skip.mT
        save_file({"acts": dense.detach(), "outputs": outputs.detach().contiguous()}, root + "/theirs")
        coder.save_to_disk(root + "-again/" + name)
"""
LOAD_CIRCUIT_TRACER = """
import gzip, json, sys
import torch, yaml
from pathlib import Path
from safetensors.torch import load_file, save_file
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.frontend.feature_models import Model
given = json.loads(sys.argv[1])
inputs = load_file(given["inputs"])["inputs"]
root = Path(given["folder"])
config = yaml.safe_load((root / "config.yaml").read_text())
paths = {int(path.stem.split("_")[1]): str(path) for path in root.glob("layer_*.safetensors")}
for lazy in (True, False):
    found = load_transcoder_set(
        paths, scan=config["scan"], feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"], lazy_encoder=lazy, lazy_decoder=lazy,
        device=torch.device("cpu"),
    )
    stacked = inputs.expand(len(found), *inputs.shape)
    acts = found.encode(stacked)
    outputs = found.decode(acts, stacked)
    saved = {"acts": acts.detach().contiguous(), "outputs": outputs.detach().contiguous()}
    save_file(saved, root / f"theirs{int(lazy)}")
found.to_safetensors(given["folder"] + "-again")
features = Path(given["features"])
for entry in json.loads(gzip.decompress((features / "index.json.gz").read_bytes())):
    content = (features / entry["filename"]).read_bytes()
    for start, end in zip(entry["offsets"], entry["offsets"][1:]):
        length = int.from_bytes(content[start : start + 4], "little")
        Model.model_validate_json(gzip.decompress(content[start + 4 : start + 4 + length]))
        assert start + 4 + length == end
"""
LOAD_CROSS_LAYER = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from circuit_tracer.utils.caching import load_transcoders_from_cache
given = json.loads(sys.argv[1])
inputs = load_file(given["inputs"])["inputs"]
for folder in map(Path, given["folders"]):
    for lazy in (True, False):
        found, config = load_transcoders_from_cache(
            folder.name, cache_dir=folder.parent, lazy_encoder=lazy, lazy_decoder=lazy, device=torch.device("cpu")
        )
        assert config["model_name"] == "tiny-gpt2", config
        assert found.feature_input_hook == "mlp.hook_in", found.feature_input_hook
        stacked = inputs.unflatten(1, (found.n_layers, -1)).transpose(0, 1)
        acts = found.encode(stacked)
        flat = lambda values: values.detach().transpose(0, 1).flatten(1).contiguous()
        save_file({"acts": flat(acts), "outputs": flat(found(stacked))}, folder / f"theirs{int(lazy)}")
    found.to_safetensors(str(folder) + "-again")
"""
MAKE_DICTIONARIES = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
given = json.loads(sys.argv[1])
inputs = load_file(given["inputs"])["inputs"]
torch.manual_seed(0)
made = [AutoEncoder(8, 24), JumpReluAutoEncoder(8, 24), AutoEncoderTopK(8, 24, 3), BatchTopKSAE(8, 24, 3)]
for coder in made:
    name = type(coder).__name__
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if name == "JumpReluAutoEncoder":
        coder.threshold = torch.nn.Parameter(torch.rand(24))
    elif name != "AutoEncoder":
        coder.threshold.fill_(0.8)
    folder = Path(given["root"]) / name
    folder.mkdir()
    trainer = {"dict_class": name, "k": 3, "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(coder.state_dict(), folder / "ae.pt")
    saved = {"acts": coder.encode(inputs), "outputs": coder(inputs)}
    save_file({k: v.detach().contiguous() for k, v in saved.items()}, folder / "theirs")
"""


@pytest.fixture
def inputs(tmp_path):
    save_file({"inputs": INPUTS}, tmp_path / "inputs.safetensors")
    return str(tmp_path / "inputs.safetensors")


def made(path, architecture, site, to, **model):
    module = random_transcoder(architecture, site)
    publish_transcoder(path / "ours", module, architecture, site, model={**MODEL, **model})
    export.run(ExportSettings(), to=to, sources=[path / "ours"], output=path / "theirs")
    return module


@pytest.mark.parametrize("releases", SAELENS)
def test_saelens_loads_every_kind_and_computes_the_same_and_what_it_saves_comes_back(tmp_path, inputs, releases):
    kinds = {
        "relu": (ReLU(), mlp_site(1)),
        "skip": (ReLU(skip=True), mlp_site(1)),
        "jump": (JumpReLU(), mlp_site(1)),
        "batch": (BatchTopK(skip=releases != SAELENS_YEAR_OLD), mlp_site(1)),  # with both, from 6.24 on
        "gated": (Gated(), mlp_site(1)),
        "sae": (ReLU(), sae_site(1)),
        "jump-sae": (JumpReLU(), sae_site(1)),
        "topk-sae": (TopK(k=3), sae_site(1)),
    }
    modules = {name: made(tmp_path / name, *kind, "saelens") for name, kind in kinds.items()}
    folders = {name: str(tmp_path / name / "theirs") for name in kinds}
    hooks = {
        folders[name]: "blocks.1.hook_mlp_out" if site == sae_site(1) else "blocks.1.mlp.hook_in"
        for name, (_, site) in kinds.items()
    }
    run_in(releases, LOAD_SAELENS, {"inputs": inputs, "folders": list(folders.values()), "hook_name": hooks})
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(1), sae_site(1)])
    for name, module in modules.items():
        theirs = load_file(Path(folders[name]) / "theirs")
        torch.testing.assert_close(theirs["acts"], module.encode(INPUTS), **CLOSE)
        torch.testing.assert_close(theirs["outputs"], module(INPUTS), **CLOSE)
        again = Path(folders[name] + "-again")
        import_transcoder.run(
            ImportSettings(), source=again, origin="saelens", cache=cache, output=tmp_path / name / "back"
        )
        torch.testing.assert_close(load_transcoder(tmp_path / name / "back")(INPUTS), module(INPUTS), **CLOSE)


@pytest.mark.parametrize("releases", SPARSIFY)
def test_sparsify_loads_topk_and_computes_the_same_and_what_it_saves_comes_back(tmp_path, inputs, releases):
    kinds = {
        "plain": (TopK(k=3), mlp_site(1)),
        "skip": (TopK(k=3, skip=True), mlp_site(1)),
        "sae": (TopK(k=3), sae_site(1)),
    }
    modules = {name: made(tmp_path / name, *kind, "sparsify") for name, kind in kinds.items()}
    folders = [str(tmp_path / name / "theirs") for name in kinds]
    run_in(releases, LOAD_SPARSIFY, {"inputs": inputs, "folders": folders})
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(1), sae_site(1)])
    for name, module in modules.items():
        theirs = load_file(tmp_path / name / "theirs/theirs")
        torch.testing.assert_close(theirs["acts"], module.encode(INPUTS), **CLOSE)
        torch.testing.assert_close(theirs["outputs"], module(INPUTS), **CLOSE)
        again = tmp_path / name / "theirs-again" / "h.1.mlp"
        import_transcoder.run(
            ImportSettings(), source=again, origin="sparsify", cache=cache, output=tmp_path / name / "back"
        )
        torch.testing.assert_close(load_transcoder(tmp_path / name / "back")(INPUTS), module(INPUTS), **CLOSE)


@pytest.mark.parametrize("releases", CIRCUIT_TRACER)
def test_circuit_tracer_loads_a_set_and_its_features_and_what_it_saves_comes_back(tmp_path, inputs, releases):
    kinds = {0: JumpReLU(), 1: TopK(k=3), 2: ReLU()}
    cache = publish_site_cache(tmp_path / "cache", [mlp_site(layer) for layer in kinds], model={**MODEL, "n_layers": 3})
    modules = {}
    for layer, architecture in kinds.items():
        modules[layer] = random_transcoder(architecture, mlp_site(layer), seed=layer)
        publish_transcoder(
            tmp_path / f"t{layer}", modules[layer], architecture, mlp_site(layer), model={**MODEL, "n_layers": 3}
        )
    sources = [tmp_path / f"t{layer}" for layer in (2, 0, 1)]
    export.run(
        ExportSettings(scan="me/set"), to="circuit-tracer", sources=sources, output=tmp_path / "set", cache=cache
    )
    tables = [
        publish_tables(tmp_path / f"tables{layer}", [dead_row(0), feature_row(1)], [example_row(1)], layer=layer)
        for layer in kinds
    ]
    export.run(ExportSettings(), to="circuit-tracer-features", sources=tables, output=tmp_path / "viewer")
    arguments = {"inputs": inputs, "folder": str(tmp_path / "set"), "features": str(tmp_path / "viewer/features")}
    run_in(releases, LOAD_CIRCUIT_TRACER, arguments)
    for lazy in (0, 1):
        theirs = load_file(tmp_path / f"set/theirs{lazy}")
        for layer in (0, 2):
            torch.testing.assert_close(theirs["acts"][layer], modules[layer].encode(INPUTS), **CLOSE)
            torch.testing.assert_close(theirs["outputs"][layer], modules[layer](INPUTS), **CLOSE)
        threshold = load_file(tmp_path / "set/layer_1.safetensors")["activation_function.threshold"]
        pre = modules[1].pre_activations(INPUTS)
        torch.testing.assert_close(theirs["acts"][1], pre * (pre > threshold), **CLOSE)
    (tmp_path / "set-again/config.yaml").write_text((tmp_path / "set/config.yaml").read_text())
    source = tmp_path / "set-again/layer_0.safetensors"
    import_transcoder.run(
        ImportSettings(), source=source, origin="circuit-tracer", cache=cache, output=tmp_path / "back"
    )
    torch.testing.assert_close(load_transcoder(tmp_path / "back")(INPUTS), modules[0](INPUTS), **CLOSE)


@pytest.mark.parametrize("releases", CIRCUIT_TRACER)
def test_circuit_tracer_loads_a_cross_layer_transcoder_and_what_it_saves_comes_back(tmp_path, releases):
    save_file({"inputs": LAYERED_INPUTS}, tmp_path / "inputs.safetensors")
    modules = {"jump": random_cross_layer(), "relu": random_cross_layer(relu=True, seed=1)}
    for name, module in modules.items():
        publish_cross_layer(tmp_path / f"{name}-ours", module)
        export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / f"{name}-ours"], output=tmp_path / name)
    arguments = {"inputs": str(tmp_path / "inputs.safetensors"), "folders": [str(tmp_path / name) for name in modules]}
    run_in(releases, LOAD_CROSS_LAYER, arguments)
    sites = [mlp_site(layer) for layer in range(N_LAYERS)]
    cache = publish_site_cache(tmp_path / "cache", sites, model={**MODEL, "n_layers": N_LAYERS})
    for name, module in modules.items():
        for lazy in (0, 1):
            theirs = load_file(tmp_path / name / f"theirs{lazy}")
            torch.testing.assert_close(theirs["acts"], module.encode(LAYERED_INPUTS), **CLOSE)
            torch.testing.assert_close(theirs["outputs"], module(LAYERED_INPUTS), **CLOSE)
        back = tmp_path / f"{name}-back"
        import_transcoder.run(
            ImportSettings(site="layer0,layer1,layer2"),
            source=tmp_path / f"{name}-again",
            origin="circuit-tracer",
            cache=cache,
            output=back,
        )
        torch.testing.assert_close(load_cross_layer(back)(LAYERED_INPUTS), module(LAYERED_INPUTS), **CLOSE)


def test_what_dictionary_learning_saves_computes_the_same_here(tmp_path, inputs):
    arguments = {"inputs": inputs, "root": str(tmp_path)}
    run_in("dictionary_learning", MAKE_DICTIONARIES, arguments)
    hook = "blocks.1.hook_resid_post"
    site = Site("residual", hook, hook, 8, 8, "float32")
    cache = publish_site_cache(tmp_path / "cache", [site])
    for name in ("AutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        theirs = load_file(tmp_path / name / "theirs")
        back = tmp_path / name / "back"
        result = import_transcoder.run(
            ImportSettings(), source=tmp_path / name, origin="dictionary-learning", cache=cache, output=back
        )
        assert result.sites == ["residual"]
        torch.testing.assert_close(load_transcoder(back).encode(INPUTS), theirs["acts"], **CLOSE)
        torch.testing.assert_close(load_transcoder(back)(INPUTS), theirs["outputs"], **CLOSE)
