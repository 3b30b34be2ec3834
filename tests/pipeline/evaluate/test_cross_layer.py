"""A cross-layer transcoder beside the language model: evaluated in place of all MLPs, and traced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.analysis.evaluate.evaluation import ALL_SITES
from tailrace.pipeline.cache.recorded_model import sample_contexts
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.training.cross_layer.layers import load_cross_layer
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import CONTEXT_LENGTH, model_folder, run_cache
from tests.support.spliced_models import WIDTH, publish_transcoder, random_transcoder
from tests.support.training_caches import publish_cache, random_rows

SETTINGS = EvaluateSettings(contexts=3, contexts_per_batch=2)
N_LAYERS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of both layers of a tiny model, and a transcoder across them."""
    place = tmp_path_factory.mktemp("across")
    run_cache(place / "cache", layers="all")
    settings = {"cross_layer": True, "architecture": {"kind": "batch_topk", "k": 4}, "d_sae": 24, "lr": 1e-2}
    train.run(
        TrainSettings.read(settings, {"steps": 40, "batch_rows": 64}),
        cache=place / "cache",
        output=place / "across",
        compute=Compute(quiet=True),
    )
    return place


def test_scores_on_the_way_are_those_of_an_evaluation(made: Path, tmp_path: Path) -> None:
    settings = {"cross_layer": True, "architecture": {"kind": "batch_topk", "k": 4}, "d_sae": 24, "lr": 1e-2}
    resampling = {"kind": "anthropic", "resample_by": "model_loss", "resample_every": 8, "resample_rows": 32}
    runs = {
        name: TrainSettings.read(settings, {"steps": 12, "batch_rows": 64, "resampling": kind})
        for name, kind in (("plain", {"kind": "none"}), ("resampled", resampling))
    }
    scores = ModelScoreSettings(evaluate_model_every=5, evaluate_model_contexts=3)
    swept = sweep.run(
        runs, cache=made / "cache", output=tmp_path / "sweep", compute=Compute(quiet=True), model_scores=scores
    )
    plain, resampled = swept.runs
    evaluation = evaluated(made, tmp_path / "evaluation", swept.path / plain.path).scores[ALL_SITES]
    assert plain.metrics["model"]["ce_spliced"] == pytest.approx(evaluation.spliced.ce, abs=1e-5)
    assert plain.metrics["model"]["ce_zero"] == pytest.approx(evaluation.zero.ce, abs=1e-5)
    assert resampled.metrics["heldout"] != plain.metrics["heldout"]


def evaluated(made: Path, output: Path, *transcoders: Path) -> evaluate.EvaluateResult:
    return evaluate.run(
        SETTINGS, transcoders=transcoders, cache=made / "cache", output=output, compute=Compute(threads=1, quiet=True)
    )


def test_all_layers_are_replaced_together_as_by_hand(made: Path, tmp_path: Path) -> None:
    import transformers

    scores = evaluated(made, tmp_path / "evaluation", made / "across").scores
    assert list(scores) == [ALL_SITES]
    cache = open_cache(made / "cache")
    split = cache.split("heldout")
    contexts = sample_contexts(split, 3, 0)
    tokens = torch.from_numpy(split.context_tokens(contexts).astype(np.int64))
    whole = load_cross_layer(made / "across")
    is_row = torch.arange(CONTEXT_LENGTH)[None, :, None] > 0
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()
    seen: list[torch.Tensor] = []

    def replace(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Encode all layers read so far together; zeros stand for those to come, whose features write only later."""
        seen.append(inputs[0])
        layer = len(seen) - 1
        rows = torch.cat([*seen, *[torch.zeros_like(seen[0])] * (N_LAYERS - len(seen))], -1)
        activations = whole.encode(rows)
        activations[..., (layer + 1) * 24 :] = 0
        return torch.where(is_row, whole.decode(activations)[..., layer * WIDTH : (layer + 1) * WIDTH], output)

    handles = [block.mlp.register_forward_hook(replace) for block in plain.transformer.h]
    with torch.inference_mode():
        logits = plain(tokens).logits
    for handle in handles:
        handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert scores[ALL_SITES].spliced.ce == pytest.approx(float(loss), rel=1e-5)
    with torch.inference_mode():
        assert abs(float(torch.nn.functional.cross_entropy(
            plain(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )) - float(loss)) > 1e-4  # fmt: skip


def test_it_is_evaluated_on_its_own_model_and_not_beside_another_of_its_layers(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    one = publish_transcoder(tmp_path / "one", cache, "layer0", random_transcoder(seed=0))
    with pytest.raises(SettingsError, match=r"across and .*one are both of site layer0; give one of them"):
        evaluated(made, tmp_path / "e", made / "across", one)
    rows = {"train": random_rows(1, 64, WIDTH, WIDTH), "heldout": random_rows(2, 64, WIDTH, WIDTH)}
    other = publish_cache(tmp_path / "other", {"layer0": rows}, model="another")
    with pytest.raises(ArtifactMismatch) as refused:
        evaluate.run(
            SETTINGS, transcoders=[made / "across"], cache=other, output=tmp_path / "e", compute=Compute(quiet=True)
        )
    assert "has no site 'layer1'" in str(refused.value)
    assert "was not trained on what" in str(refused.value)


def test_a_circuit_is_traced_through_it(made: Path, tmp_path: Path) -> None:
    words = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    known = sorted(words, key=lambda word: words[word])
    result = circuit.run(
        CircuitSettings(iterations=2, branches=6, max_features=20),
        Question(" ".join(known[2:9]), logit=known[10]),
        transcoders=[made / "across"],
        output=tmp_path / "circuit",
        model=str(model_folder()),
        compute=Compute(threads=1),
    )
    document = result.document
    assert document["root"]["incompleteness"] < 1e-5
    assert document["attribution_graph"]["incompleteness"] < 1e-5
    assert any(node["kind"] == "feature" for node in document["attribution_graph"]["nodes"])
    assert (tmp_path / "circuit" / "index.html").exists()
    assert (tmp_path / "circuit" / "viewer.json").exists()
    with pytest.raises(SettingsError, match="this transcoder has features 0 to 23"):
        circuit.run(
            CircuitSettings(),
            Question(known[2], feature=(1, 24)),
            transcoders=[made / "across"],
            output=tmp_path / "none",
            model=str(model_folder()),
        )
