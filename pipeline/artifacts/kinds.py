"""Transcoders of one layer, and of several at once, where either will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailrace.storage.artifact import MANIFEST, read_json
from tailrace.training.architectures.transcoder import read_transcoder_manifest
from tailrace.training.cross_layer.artifact import KIND, read_cross_layer_manifest


def is_cross_layer(path: Path) -> bool:
    """Return whether a published cross-layer transcoder lies at ``path``."""
    manifest = path / MANIFEST
    content = read_json(manifest) if manifest.is_file() else None
    return isinstance(content, dict) and content.get("kind") == KIND


def read_either_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a transcoder of either kind; the errors are those of ``read_manifest``.

    Both say ``model``, ``d_sae`` and ``digest``; one of several layers has ``sites`` in place of ``site``.
    """
    return read_cross_layer_manifest(path) if is_cross_layer(path) else read_transcoder_manifest(path)
