"""The notebook runs from its first cell to its last, on transcoders of every layer of the bundled tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import circuits_model
from pipeline.circuits_model import CircuitsModelSettings
from pipeline.samples.bundled_models import bundled_model

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "one_circuit.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def run_cells(changes: dict[str, Any]) -> dict[str, Any]:
    """Run every cell in one namespace; ``changes`` take the place of what the cell of parameters sets."""
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
        if parameters(cell):
            assert changes.keys() <= names.keys()
            names |= changes
    return names


@pytest.mark.slow
def test_every_cell_runs_and_what_it_says_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(bundled_model("tiny-lm"))
    text = str(ROOT / "tests" / "data" / "speeches.jsonl")
    settings = CircuitsModelSettings(
        model=model, dataset=text, tokens=8000, holdout="3", d_sae=256, k=16, steps=100, batch_rows=512, lr=2e-3
    )
    made = circuits_model.run(settings, output=tmp_path, threads=1, quiet=True)
    prompt = "It is my duty to give to the Congress information of the state of the"
    question = {"prompt": prompt, "answer": " Union", "other": " war"}
    names = run_cells({"circuits": made.path.parent, "model_folder": model, **question})
    assert names["terms"].incompleteness(names["root"].value) < 1e-5
    assert names["graph"].incompleteness() < 1e-4
    # what the attribution calls a circuit matters more than as many features drawn at random
    drawn = [names["graph"].nodes[place] for place in names["drawn"]]
    before, circuit, others = (names["without"](nodes) for nodes in ([], names["helping"], drawn))
    assert abs(circuit - before) > abs(others - before)
    assert "features of the circuit" in capsys.readouterr().out


def test_the_notebook_begins_with_its_parameters_and_keeps_no_traceback() -> None:
    cells = code_cells()
    assert [parameters(cell) for cell in cells] == [True, *[False] * (len(cells) - 1)]
    for cell in cells:
        ast.parse("".join(cell["source"]))
        assert all(output["output_type"] == "stream" for output in cell["outputs"])
