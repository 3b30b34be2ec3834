"""The tutorials run from the first cell to the last, and what they say of their results holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tailrace
from tailrace.analysis.interventions.generation import NextTokenChange
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.cache.verify import Verification
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.steer.stage import SteeredText, SteerResult
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.stage import TrainResult
from tests.support.notebooks import NOTEBOOKS, code_cells, is_parameters, run_notebook
from tests.support.paths import DOCS, ROOT, SPEECHES

RELEASED = ROOT / "tests" / "released" / "d14043a"


@pytest.fixture(scope="module")
def to_features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {"model": str(bundled_model("tiny-lm")), "text": str(SPEECHES), "out": tmp_path_factory.mktemp("out")}
    return run_notebook(DOCS / "notebooks" / "text_to_features.ipynb", changes)


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {"base": str(bundled_model("tiny-lm")), "text": str(SPEECHES), "out": tmp_path_factory.mktemp("out")}
    return run_notebook(DOCS / "notebooks" / "own_model.ipynb", changes)


@pytest.mark.slow
def test_from_text_to_features_explains_most_of_the_output_and_lists_rare_features(to_features: dict[str, Any]) -> None:
    assert to_features["checked"].passed
    assert to_features["score"]["fvu"] < 0.4
    assert to_features["score"]["l0"] == 16
    scores = [run.metrics["heldout"]["fvu"] for run in to_features["swept"].runs if run.metrics]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 4
    assert to_features["evaluated"].scores["layer2"].ce_recovered > 0.5
    assert len(to_features["named"]) == 8
    assert to_features["named"]["frequency"].between(0.002, 0.01).all()
    assert to_features["feature"].fires_on[0] == to_features["named"]["top_token"][0]
    cards = ("Activation cache", "Checked: passed", "Transcoder", "Sweep", "Evaluation", "<table", "Feature")
    assert [card for card, html in zip(cards, to_features["shown"], strict=True) if card not in html] == []


@pytest.mark.slow
def test_own_model_goes_on_from_the_base_models_transcoder_better_than_from_random_weights(
    own_model: dict[str, Any],
) -> None:
    kept, fresh = (own_model[name].metrics["heldout"]["fvu"] for name in ("kept", "fresh"))
    assert kept < fresh
    norms = own_model["after"].W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))  # the product of two rows is their cosine
    assert "was not trained on what" in own_model["printed"]
    assert own_model["caches"]["tuned"].cache.sites.keys() == {"layer2", "stream"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_parameters_and_keeps_what_it_printed_and_no_traceback(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [is_parameters(cell) for cell in cells] == [True, *[False] * (len(cells) - 1)]
    for cell in cells:
        ast.parse("".join(cell["source"]))
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "execute_result"}
        shown = ["".join(output["data"]["text/html"]) for output in cell["outputs"] if "data" in output]
        assert [html for html in shown if re.search(r"<(script|link|img|iframe)\b|https?:", html)] == []
    assert any(cell["outputs"] for cell in cells)


def steered() -> SteerResult:
    own = SteeredText(0, 0, None, None, (" of",), (5,), None)
    changed = SteeredText(0, 1, None, "85=+30", (" have <b>",), (6,), NextTokenChange(kl=0.5, n_changed=1, n_tokens=2))
    return SteerResult(("The people",), ("the model", "85=+30"), (own, changed), {})


SHOWN: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "cache": (lambda: tailrace.open_cache(RELEASED / "caches/bfloat16"), ["layer0", "train rows", "8 → 8"]),
    "transcoder": (lambda: tailrace.load_transcoder(RELEASED / "transcoders/topk"), ["TopKTranscoder", "d_sae", "k"]),
    "cross-layer": (lambda: tailrace.load_transcoder(RELEASED / "transcoders/cross-layer"), ["features_per_layer"]),
    "trained": (lambda: TrainResult(RELEASED, {"steps": 3, "rows": 9, "heldout": {"fvu": 0.25}}), ["FVU", "0.25"]),
    "sweep": (lambda: sweep.read_result(RELEASED / "sweep"), ["held-out FVU", "dead"]),
    "tables": (lambda: analyze.read_result(RELEASED / "tables/topk"), ["features", "L0"]),
    "feature": (lambda: analyze.read_result(RELEASED / "tables/topk").feature(0), ["fires on", "font-weight:bold"]),
    "evaluation": (lambda: evaluate.read_result(RELEASED / "evaluations/layers"), ["recovered", "KL"]),
    "circuit": (lambda: circuit.read_result(RELEASED / "circuits/logit"), ["influence", "made of", "circuit"]),
    "steered": (lambda: steered(), ["<b>The people</b>", "+30", "have &lt;b&gt;", "0.25", "50.0%"]),
    "verified": (lambda: Verification(RELEASED, damage=["weights: <torn>"]), ["DAMAGED", "&lt;torn&gt;"]),
}
"""What the public functions return, read from artifacts of an earlier release, and words of the cards."""


@pytest.mark.parametrize("name", SHOWN)
def test_an_object_shows_its_numbers_in_a_notebook_without_scripts(name: str) -> None:
    make, words = SHOWN[name]
    value = make()
    html = value._repr_html_()
    assert [word for word in words if word not in html] == []
    assert re.search(r"<(script|style|link|img|iframe)\b|https?:|\bNone\b|\bnan\b", html) is None
    tags = ("div", "table", "tr", "span", "code")
    unbalanced = [tag for tag in tags if html.count(f"<{tag}") != html.count(f"</{tag}")]
    assert unbalanced == []
    assert len(repr(value)) < 3000


def test_the_plain_forms_of_a_transcoder_and_a_cache_say_their_sizes() -> None:
    assert repr(tailrace.load_transcoder(RELEASED / "transcoders/topk")) == (
        "TopKTranscoder(d_in=8, d_out=8, d_sae=16, k=4)"
    )
    cache = tailrace.open_cache(RELEASED / "caches/bfloat16")
    assert repr(cache).endswith("sites=['layer0', 'layer1'], train=48 rows)")


def test_a_feature_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(tailrace.SettingsError, match="has no feature 16; its features are 0 to 15"):
        analyze.read_result(RELEASED / "tables/topk").feature(16)


def test_paths_that_notebooks_begin_with_are_those_of_the_repository() -> None:
    for name in ("text_to_features", "own_model"):
        names: dict[str, Any] = {}
        exec("".join(code_cells(DOCS / "notebooks" / f"{name}.ipynb")[0]["source"]), names)
        assert (ROOT / (names.get("model") or names["base"]) / "config.json").exists()
        assert (ROOT / names["text"]).exists()
