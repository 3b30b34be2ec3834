"""Safetensors and JSON files of an export, each there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tailrace.storage.artifact import write_atomically
from tailrace.training.architectures.transcoder import write_tensors

__all__ = ["write_json", "write_tensors"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys in the order given. Raises StorageFull if the disk refuses."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def present(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the tensors there are."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
