"""What ``pipeline info`` shows of manifests that were written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailrace.pipeline.artifacts.info_stage import SUMMARIES
from tailrace.storage.artifact import seal


def shown(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of an artifact of which the manifest says this."""
    kind, summary = SUMMARIES[manifest["kind"]]
    common = {"request": {}, "files": {}, "inputs": {}, "model": {"name": "tiny-lm", "dtype": "float32"}}
    return dict(summary(kind.parse(seal({**common, **manifest}), Path("manifest.json"))))
