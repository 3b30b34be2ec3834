"""Sums add up on real models too, with random transcoders for every layer."""

from __future__ import annotations

import json

import pytest
import torch

from tailrace.analysis.circuits.attribution import attribute
from tailrace.analysis.circuits.attribution_graph import GraphSettings, build_graph, top_logits
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import centred_logit_roots, decoder_root, feature_root, logit_root
from tailrace.analysis.circuits.run import LinearisedRun
from tailrace.pipeline.circuit.question import prompt_tokens
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import TopK
from tests.support.circuit_runs import random_transcoder
from tests.support.paths import ROOT, SPEECHES


def run_with_random_transcoders(model: LanguageModel, n_tokens: int, d_sae: int) -> LinearisedRun:
    weights = read_weights(model)
    width = weights.d_model
    coders = {
        Site(f"layer{layer}", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out", width, width, "float32"):
            random_transcoder(layer, settings=TopK(k=32), width=width, d_sae=d_sae)
        for layer in range(weights.n_layers)
    }  # fmt: skip
    text = json.loads((SPEECHES).read_text().splitlines()[0])["text"]
    return record_run(model.bridge, weights, coders, torch.tensor(prompt_tokens(model, text[:700])[:n_tokens]))


def incompletenesses(run: LinearisedRun) -> list[float]:
    last = run.n_layers - 1
    features = [(layer, int(run.transcoders[layer].feature[-1])) for layer in (0, last // 2, last)]
    roots = [logit_root(run, 100), logit_root(run, 200, run.n_tokens // 2, minus=5), decoder_root(run, *features[1])]
    roots += [feature_root(run, layer, index) for layer, index in features]
    rows = attribute(run, [root.probe for root in roots]).double()
    through = [
        abs(float(row.sum()) - root.value) / float(row.abs().sum()) for row, root in zip(rows, roots, strict=True)
    ]
    return through + [contributions(run, root.probe).incompleteness(root.value) for root in roots]


def test_sums_add_up_on_the_bundled_model_in_float32() -> None:
    model = load_language_model(ModelSettings(model=str(bundled_model("tiny-lm")), model_dtype="float32"))
    run = run_with_random_transcoders(model, 48, 256)
    assert max(incompletenesses(run)) < 1e-5
    likely = top_logits(run)
    roots = centred_logit_roots(run, [one for one, _ in likely])
    graph = build_graph(run, roots, [p for _, p in likely], GraphSettings(max_features=64))
    assert graph.incompleteness() < 1e-5


def test_sums_add_up_on_the_bundled_model_in_float64() -> None:
    model = load_language_model(ModelSettings(model=str(bundled_model("tiny-lm")), model_dtype="float32"))
    model.bridge.double()
    run = run_with_random_transcoders(model, 48, 256)
    assert run.dtype == torch.float64
    assert max(incompletenesses(run)) < 1e-9


@pytest.mark.slow
def test_sums_add_up_on_smollm2_with_transcoders_of_all_thirty_layers() -> None:
    folder = fetch_smollm2(ROOT / "demo" / "smollm2-135m")
    model = load_language_model(ModelSettings(model=str(folder), model_dtype="float32"))
    assert max(incompletenesses(run_with_random_transcoders(model, 128, 4096))) < 1e-5
