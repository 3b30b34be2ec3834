"""The language models that come with this package, found wherever it is installed."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from tailrace.storage.errors import ModelError
from tailrace.storage.names import matching

DemoModel = Literal["tiny", "smollm2"]
"""What ``pipeline demo`` runs on: the bundled model, or a download."""


def bundled_model(name: str) -> Path:
    """Return the folder of a language model that comes with this package; raise ModelError if there is none such."""
    models = Path(str(files("tailrace.pipeline.samples").joinpath("models"))).resolve()
    folder = models / name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in matching(models, "*/config.json"))
        raise ModelError(f"no language model {name!r} comes with this package; it has: {', '.join(known) or 'none'}")
    return folder
