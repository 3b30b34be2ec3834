"""From a prompt to features by each package's own path, with an export of ours: the features are those computed here.

The packages tokenize the prompt, run the model (the bundled one) and read its hooks themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tailrace.pipeline.circuit.question import prompt_tokens
from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.model.language_model import LanguageModel, SiteHooks, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tests.support.cross_layer_transcoders import D_SAE, publish_cross_layer, random_cross_layer
from tests.support.interop import (
    CIRCUIT_TRACER,
    LOAD_HOOKED,
    LOAD_MODEL,
    SAELENS,
    SPARSIFY,
    run_in,
)
from tests.support.layered_transcoders import mlp_site, publish_site_cache, publish_transcoder, random_transcoder
from tests.support.tables_by_hand import publish_latents

pytestmark = pytest.mark.interop

PROMPT = "The people of this country have never asked for more than their rights, and they will not take less."
WIDTH, N_LAYERS, CONTEXT = 128, 4, 64
CLOSE: dict[str, Any] = {
    "rtol": 1e-4,
    "atol": 1e-4,
}  # float32 through up to four layers, sums of 128 products of size 1
LIVE = {
    "live": {
        "packing": {"context_length": CONTEXT, "exclude": "special", "first_position": 4},
        "text": {"source": "hub", "dataset": "some/text"},
    }
}

SAELENS_FEATURES = (
    LOAD_HOOKED
    + """
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
for folder in map(Path, given["folders"]):
    coder = SAE.load_from_disk(folder)
    about = coder.cfg.metadata
    model = load(HookedSAETransformer, **about.model_from_pretrained_kwargs)
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(given["prompt"], saes=[coder])
    (acts,) = [values for name, values in cache.items() if name.endswith("hook_sae_acts_post")]
    save_file({"tokens": model.to_tokens(given["prompt"])[0], "acts": acts[0].contiguous()}, folder / "theirs")
assert about.seqpos_slice == [4, None], about.seqpos_slice
store = ActivationsStore.from_sae(
    model, coder, dataset=Dataset.from_dict({"text": [given["prompt"] * 9] * 40}), streaming=False,
    store_batch_size_prompts=2, device="cpu",
)
assert store.get_batch_tokens().shape == (2, given["context"]), store.get_batch_tokens().shape
"""
)
CIRCUIT_TRACER_FEATURES = (
    LOAD_HOOKED
    + """
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
for name in given["sets"]:
    # by its name: CIRCUIT_TRACER_CACHE_DIR says where
    transcoders, config = load_transcoder_from_hub(name, device=torch.device("cpu"), dtype=torch.float32)
    model = load(TransformerLensReplacementModel)
    model._configure_replacement_model(transcoders)
    _, acts = model.get_activations(given["prompt"])
    saved = {"tokens": model.to_tokens(given["prompt"])[0], "acts": acts.detach().contiguous()}
    save_file(saved, Path(given["root"]) / name / "theirs")
"""
)
SPARSIFY_FEATURES = (
    LOAD_MODEL
    + """
from sparsify import SparseCoder
tokens = torch.tensor([given["tokens"]])
for folder in map(Path, given["folders"]):
    ((name, coder),) = SparseCoder.load_many(str(folder), local=True).items()
    held = {}
    def hold(module, inputs, outputs):
        held["rows"] = (inputs[0] if coder.cfg.transcode else outputs)[0]
    handle = published.base_model.get_submodule(name).register_forward_hook(hold)
    with torch.no_grad():
        published(tokens)
        values, features, _ = coder.encode(held["rows"])
    handle.remove()
    acts = torch.zeros(len(values), coder.num_latents).scatter_(1, features, values)
    save_file({"tokens": tokens[0], "acts": acts}, folder / "theirs")
"""
)
DELPHI_FEATURES = (
    LOAD_MODEL
    + """
from delphi.latents.collect_activations import collect_activations
from delphi.sparse_coders.load_sparsify import load_sparsify_sparse_coders, sae_dense_latents
tokens, model = torch.tensor([given["tokens"]]), published.base_model
for folder, transcodes in zip(map(Path, given["folders"]), given["transcode"]):
    ((name, coder),) = load_sparsify_sparse_coders(str(folder), ["h.1.mlp"], "cpu").items()
    with torch.no_grad(), collect_activations(model, [name], transcodes) as activations:
        model(tokens)
        acts = sae_dense_latents(activations[name], coder)
    save_file({"tokens": tokens[0], "acts": acts[0].contiguous()}, folder / "theirs")
"""
)
DELPHI_LATENTS = """
import json, sys
import torch
from safetensors.torch import save_file
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
given = json.loads(sys.argv[1])
dataset = LatentDataset(given["latents"], SamplerConfig(), ConstructorConfig(), tokenizer="not asked")
parts = [buffer.load() for buffer in dataset.buffers]
locations, activations = (torch.cat([part[number] for part in parts]) for number in (0, 1))
saved = {"locations": locations, "activations": activations.float(), "tokens": dataset.tokens}
save_file({name: values.contiguous() for name, values in saved.items()}, given["out"])
"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(ModelSettings(model=str(bundled_model("tiny-lm"))))


@pytest.fixture(scope="module")
def tokens(model: LanguageModel) -> list[int]:
    return prompt_tokens(model, PROMPT)


def mlp(layer: int) -> Site:
    return mlp_site(layer, WIDTH, WIDTH)


def one_hook(hook: str) -> Site:
    return Site(hook, hook, hook, WIDTH, WIDTH, "float32")


def rows_of(model: LanguageModel, tokens: list[int], site: Site) -> Tensor:
    """Return what the site's input hook holds on the prompt, (positions, width)."""
    held = model.capture(torch.tensor([tokens]), [SiteHooks(site.name, site.hook_in, site.hook_out)])
    return held[site.hook_in][0].float().clone()


def published(path: Path, model: LanguageModel, architecture: Architecture, site: Site, seed: int = 0) -> Transcoder:
    module = random_transcoder(architecture, site, d_sae=64, seed=seed)
    publish_transcoder(path, module, architecture, site, model=model.identity(), inputs=LIVE)
    return module


def check(folder: Path, tokens: list[int], expected: Tensor) -> None:
    """Compare tokens and features (…, positions, features), and see that there is something to compare."""
    theirs = load_file(folder / "theirs")
    assert theirs["tokens"].tolist() == tokens
    assert 0.01 < float((expected > 0).float().mean()) < 0.9
    torch.testing.assert_close(theirs["acts"], expected, **CLOSE)


def arguments(tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"model": str(bundled_model("tiny-lm")), "prompt": PROMPT, "tokens": tokens, "context": CONTEXT, **more}


@pytest.mark.parametrize("releases", SAELENS)
def test_saelens_has_our_features_of_a_prompt(tmp_path, model, tokens, releases):
    kinds: dict[str, tuple[Architecture, Site]] = {
        "relu": (ReLU(), mlp(1)),
        "jump": (JumpReLU(), mlp(2)),
        "gated": (Gated(), mlp(0)),
        "skip": (ReLU(skip=True), mlp(3)),
        "batch": (BatchTopK(), mlp(3)),
        "normalised": (
            ReLU(),
            Site("n", "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_out", WIDTH, WIDTH, "float32"),
        ),
        "stream": (TopK(k=5), one_hook("blocks.2.hook_resid_post")),
        "heads": (JumpReLU(), one_hook("blocks.1.attn.hook_z")),
        "mlp-out": (ReLU(), one_hook("blocks.1.mlp.hook_out")),
    }
    modules = {}
    for name, (architecture, site) in kinds.items():
        modules[name] = published(tmp_path / name / "ours", model, architecture, site)
        export.run(ExportSettings(), to="saelens", sources=[tmp_path / name / "ours"], output=tmp_path / name / "out")
    folders = {name: tmp_path / name / "out" for name in kinds}
    run_in(releases, SAELENS_FEATURES, arguments(tokens, folders=[str(folder) for folder in folders.values()]))
    for name, (_, site) in kinds.items():
        check(folders[name], tokens, modules[name].encode(rows_of(model, tokens, site)))


@pytest.mark.parametrize("releases", CIRCUIT_TRACER)
def test_circuit_tracer_has_our_features_of_a_prompt(tmp_path, monkeypatch, model, tokens, releases):
    sites = [mlp(layer) for layer in range(N_LAYERS)]
    cache = publish_site_cache(tmp_path / "cache", sites, model=model.identity())
    sets: dict[str, Architecture] = {"jump": JumpReLU(), "topk": TopK(k=5), "folded": ReLU()}
    expected = {}
    rows = [rows_of(model, tokens, site) for site in sites]
    for name, architecture in sets.items():
        paths = [tmp_path / "ours" / f"{name}{layer}" for layer in range(N_LAYERS)]
        modules = [
            published(path, model, architecture, site, seed)
            for seed, (path, site) in enumerate(zip(paths, sites, strict=True))
        ]
        settings = ExportSettings(fold_norm=name == "folded")
        folder, given = str(bundled_model("tiny-lm")), cache if name == "topk" else None
        export.run(settings, to="circuit-tracer", sources=paths, output=tmp_path / name, model=folder, cache=given)
        expected[name] = torch.stack([module.encode(inputs) for module, inputs in zip(modules, rows, strict=True)])
        if name == "topk":
            for layer, module in enumerate(modules):
                kept = load_file(tmp_path / name / f"layer_{layer}.safetensors")["activation_function.threshold"]
                pre = module.pre_activations(rows[layer])
                expected[name][layer] = pre * (pre > kept)
    across = random_cross_layer(width=WIDTH, n_layers=N_LAYERS)
    publish_cross_layer(tmp_path / "ours/across", across, sites, model=model.identity())
    export.run(ExportSettings(), to="circuit-tracer", sources=[tmp_path / "ours/across"], output=tmp_path / "across")
    flat = across.encode(torch.cat(rows, 1))
    expected["across"] = flat.unflatten(1, (N_LAYERS, D_SAE)).transpose(0, 1).contiguous()
    monkeypatch.setenv("CIRCUIT_TRACER_CACHE_DIR", str(tmp_path))
    run_in(releases, CIRCUIT_TRACER_FEATURES, arguments(tokens, root=str(tmp_path), sets=list(expected)))
    for name, features in expected.items():
        features[:, 0] = 0  # it gives no features to position 0
        if name == "folded" and releases == "circuit_tracer_lens2":
            # as the export says: there, ln2.hook_normalized is behind the norm's gain and bias
            with pytest.raises(AssertionError, match="Tensor-likes are not close"):
                check(tmp_path / name, tokens, features)
        else:
            check(tmp_path / name, tokens, features)


@pytest.mark.parametrize("releases", [*SPARSIFY, "delphi"])
def test_sparsify_and_delphi_have_our_features_of_a_prompt(tmp_path, model, tokens, releases):
    kinds = {
        "plain": (TopK(k=5), mlp(1)),
        "skip": (TopK(k=5, skip=True), mlp(1)),
        "sae": (TopK(k=5), one_hook("blocks.1.mlp.hook_out")),
    }
    modules = {}
    for name, (architecture, site) in kinds.items():
        modules[name] = published(tmp_path / name / "ours", model, architecture, site)
        export.run(ExportSettings(), to="sparsify", sources=[tmp_path / name / "ours"], output=tmp_path / name / "out")
    folders = {name: tmp_path / name / "out" for name in kinds}
    given = arguments(
        tokens,
        folders=[str(folder) for folder in folders.values()],
        transcode=[site.hook_in != site.hook_out for _, site in kinds.values()],
    )
    run_in(releases, DELPHI_FEATURES if releases == "delphi" else SPARSIFY_FEATURES, given)
    for name, (_, site) in kinds.items():
        check(folders[name], tokens, modules[name].encode(rows_of(model, tokens, site)))


def test_delphi_reads_every_activation_where_the_tables_have_it(tmp_path):
    root, split, context, position, made = publish_latents(tmp_path)
    export.run(
        ExportSettings(model_name="me/tiny"),
        to="delphi",
        sources=[root / "t"],
        output=tmp_path / "out",
        cache=root / "cache",
    )
    run_in("delphi", DELPHI_LATENTS, {"latents": str(tmp_path / "out/latents"), "out": str(tmp_path / "theirs")})
    theirs = load_file(tmp_path / "theirs")
    feature, row, activation = (np.concatenate([part[number] for part in made.values()]) for number in range(3))
    numbers = np.searchsorted(np.unique(context), context[row])
    assert theirs["locations"].tolist() == np.stack([numbers, position[row], feature], 1).tolist()
    assert theirs["activations"].numpy() == pytest.approx(activation, rel=1e-3)  # kept in float16 where that holds it
    assert theirs["tokens"].tolist() == split.context_tokens(np.unique(context)).tolist()
