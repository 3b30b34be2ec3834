"""The notebooks of docs/notebooks, run cell by cell in one namespace."""

from __future__ import annotations

import json
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
    """Return what the cells define, and what they print under ``printed``; ``changes`` replace parameters."""
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()) as printed:
        for cell in code_cells(notebook):
            exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), names)
            if is_parameters(cell):
                assert changes.keys() <= names.keys()
                names |= changes
    return {**names, "printed": printed.getvalue()}
