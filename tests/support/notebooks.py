"""The notebooks of docs/notebooks, run cell by cell in one namespace.

``python -m tests.support.notebooks docs/notebooks/NAME.ipynb`` runs a notebook where it is called, and keeps in it what
its cells print and show, as Jupyter would.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from tests.support.paths import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def run_notebook(notebook: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return what the cells define, what they print under ``printed`` and the HTML they show under ``shown``.

    ``changes`` replace parameters.
    """
    names: dict[str, Any] = {}
    outputs = [output for found in run_cells(notebook, code_cells(notebook), names, changes) for output in found]
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    shown = ["".join(output["data"].get("text/html", [])) for output in outputs if "data" in output]
    return {**names, "printed": printed, "shown": shown}


def run_cells(
    notebook: Path, cells: list[dict[str, Any]], names: dict[str, Any], changes: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Run cells in the namespace ``names``; yield the outputs of each as a notebook keeps them."""
    for count, cell in enumerate(cells, start=1):
        tree, last = ast.parse("".join(cell["source"])), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        name = f"{notebook.name}:{cell['id']}"
        with redirect_stdout(StringIO()) as printed:
            exec(compile(tree, name, "exec"), names)
            value = None if last is None else eval(compile(last, name, "eval"), names)
        if is_parameters(cell):
            assert changes.keys() <= names.keys()
            names |= changes
        text = printed.getvalue().splitlines(keepends=True)
        outputs = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
        yield [*outputs, *([] if value is None else [_shown(value, count)])]


def _shown(value: Any, count: int) -> dict[str, Any]:
    """Return the output of a cell whose last line has a value."""
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        html = re.sub(r"<style scoped>.*?</style>\n?", "", value._repr_html_(), flags=re.DOTALL)  # a data frame's
        data = {"text/html": html.splitlines(keepends=True), **data}
    return {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}


def keep_outputs(notebook: Path) -> None:
    """Run a notebook and write its outputs into it."""
    content = json.loads(notebook.read_text())
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for count, (cell, outputs) in enumerate(zip(cells, run_cells(notebook, cells, {}, {}), strict=True), start=1):
        cell["execution_count"], cell["outputs"] = count, outputs
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep_outputs(Path(argument))
