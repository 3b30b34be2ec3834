"""Where a language model lies by what an artifact records of it.

A model from the hub is opened by its name. One from a folder is not asked for there, not even if the hub has a model of
that name: its files could not be those recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.storage.errors import ModelError


def recorded_place(identity: Mapping[str, Any], place: str, artifact: Path) -> str:
    """Return ``place``, the hub's name or the folder recorded by ``artifact``; or this package's own copy of the model.

    Raises ModelError for a folder that is not there.
    """
    folder = Path(place).expanduser()
    if identity.get("files_digest") is None or folder.is_dir():
        return place
    try:
        return str(bundled_model(str(identity["name"])))
    except ModelError:
        gone = "is gone" if folder.is_absolute() else "is not in the current directory"
        raise ModelError(
            f"{artifact}: its language model was read from a folder, {place}, which {gone}; "
            "say where it lies with --model"
        ) from None
