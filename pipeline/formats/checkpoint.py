"""Checkpoints that torch wrote, opened without running anything they say.

Unpickling runs whatever a file asks for, so it is never done. torch's restricted reader builds tensors and plain values
only; a configuration object's class is given to it as an empty bag, whatever it was called, and any other name in the
file is refused before a byte of it is used.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing

_NUMBER_TYPES = (np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType)
_NUMBERS: dict[str, Any] = {
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,
}
"""What a NumPy number among the settings needs (l1 is one in some files); each only builds a number."""
_NOTHING = re.compile(r"(?!)")


class Bag:
    """Stands for a configuration's class: holds what the file says and does nothing."""


def load_checkpoint(path: Path, configuration: re.Pattern[str] = _NOTHING) -> dict[Any, Any]:
    """Return the mapping in a checkpoint, tensors on the CPU; empty if it holds anything else.

    Objects of classes whose full name ``configuration`` matches come back as a ``Bag``. Raises ArtifactMissing,
    ArtifactCorrupt, or ArtifactMismatch for a bare pickle and for names that no such file needs.
    """
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    if not zipfile.is_zipfile(path):
        raise ArtifactMismatch(
            f"{path}: is no checkpoint that torch.save wrote; a bare pickle (.pkl, .pkl.gz) could run anything when it "
            "is opened and is not read. Take the .pt file of the same transcoder"
        )
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        bags: list[Any] = [(Bag, name) for name in names if configuration.fullmatch(name)]
        numbers: list[Any] = [(_NUMBERS[name], name) for name in names if name in _NUMBERS]
        if strange := sorted(name for name in names if not configuration.fullmatch(name) and name not in _NUMBERS):
            raise ArtifactMismatch(
                f"{path}: asks for {', '.join(strange)} to be loaded, which no such checkpoint needs and which could "
                "run anything; it is not opened"
            )
        with torch.serialization.safe_globals([*bags, *numbers, *(_NUMBER_TYPES if numbers else ())]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactMismatch:
        raise
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        raise ArtifactCorrupt(f"{path}: cannot be read as a checkpoint ({error}); get the file again") from error
    return dict(content) if isinstance(content, dict) else {}
