"""The notebook runs from its first cell to its last, on transcoders of every layer of the bundled tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import layer_set as circuits_model
from tailrace.pipeline.train.settings import CircuitsModelSettings
from tests.support.notebooks import run_notebook
from tests.support.paths import DOCS, SPEECHES

NOTEBOOK = DOCS / "notebooks" / "one_circuit.ipynb"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything the notebook defines, its cells run on the tiny model, and what they print under ``printed``."""
    model = str(bundled_model("tiny-lm"))
    text = str(SPEECHES)
    settings = CircuitsModelSettings(
        model=model, dataset=text, tokens=8000, holdout="3", d_sae=256, k=16, steps=100, batch_rows=512, lr=2e-3
    )
    made = circuits_model.run(settings, output=tmp_path_factory.mktemp("set"), compute=Compute(threads=1, quiet=True))
    prompt = "It is my duty to give to the Congress information of the state of the"
    question = {"prompt": prompt, "answer": " Union", "other": " war", "draws": 39}
    return run_notebook(NOTEBOOK, {"circuits": made.path.parent, "model_folder": model, **question})


@pytest.mark.slow
def test_every_cell_runs_and_what_it_says_adds_up(names: dict[str, Any]) -> None:
    assert names["terms"].incompleteness(names["root"].value) < 1e-5
    assert names["graph"].incompleteness() < 1e-4
    assert abs(names["as_it_is"] - names["root"].value) < 1e-4
    assert f"without {len(names['helping'])} features of the circuit" in names["printed"]


@pytest.mark.slow
def test_every_draw_is_of_as_many_other_features_active_at_the_same_places(names: dict[str, Any]) -> None:
    circuit, run = names["circuit"], names["run"]
    assert sum(map(len, circuit.values())) == len(names["helping"]) > 1
    assert len(names["null"]) == 39
    for drawn in names["null"]:
        assert drawn.keys() == circuit.keys()
        for (layer, token), features in drawn.items():
            assert len(set(features)) == len(circuit[layer, token])
            assert not set(features) & set(circuit[layer, token])
            transcoder = run.layers[layer].features.transcoder
            activations = transcoder.encode(run.layers[layer].mlp_in[token][None])[0]
            assert bool((activations[features] > 0).all())
    assert len({str(drawn) for drawn in names["null"]}) > 20


@pytest.mark.slow
def test_as_much_is_taken_out_as_the_circuits_features_write(names: dict[str, Any]) -> None:
    drawn = names["null"][0]
    for place, factor in names["as_much"](drawn).items():
        circuit = names["written"](*place, names["circuit"][place])
        taken_out = (1 - factor) * names["written"](*place, drawn[place])
        assert float(taken_out.norm()) == pytest.approx(float(circuit.norm()), rel=1e-5)


@pytest.mark.slow
def test_p_values_are_ranks_and_the_circuit_matters_more_than_most_draws(names: dict[str, Any]) -> None:
    for name, moves in names["moves"].items():
        ranked = sorted([*map(abs, moves.tolist()), abs(names["moved"])], reverse=True)
        assert names["p_values"][name] == pytest.approx((1 + ranked.index(abs(names["moved"]))) / 40)
    off = names["p_values"]["drawn features off"]
    assert off < 0.5
    assert f"p = {off:.3g}" in names["printed"]
