"""The tutorials run from the first cell to the last, and what they say of their results holds."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.pipeline.samples.bundled_models import bundled_model
from tests.support.notebooks import NOTEBOOKS, code_cells, is_parameters, run_notebook
from tests.support.paths import DOCS, ROOT, SPEECHES


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
    assert all(0.002 <= feature["frequency"] <= 0.01 for feature in to_features["named"])
    assert [example["kind"] for example in to_features["examples"]] == ["top"] * 4


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
        assert all(output["output_type"] == "stream" for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


def test_paths_that_notebooks_begin_with_are_those_of_the_repository() -> None:
    for name in ("text_to_features", "own_model"):
        names: dict[str, Any] = {}
        exec("".join(code_cells(DOCS / "notebooks" / f"{name}.ipynb")[0]["source"]), names)
        assert (ROOT / (names.get("model") or names["base"]) / "config.json").exists()
        assert (ROOT / names["text"]).exists()
