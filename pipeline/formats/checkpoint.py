"""Checkpoints that torch wrote, opened without running anything they say.

Unpickling runs whatever a file asks for, so nothing is unpickled freely. torch's restricted reader builds tensors and
plain values only, and so does the reader of bare pickles here; a configuration object's class is given to them as an
empty bag, whatever it was called, and any other name in the file is refused before it is used.
"""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
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


_TENSOR_PARTS = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)},
}
"""What a bare pickle of tensors needs; each only builds what it is called after."""
_LOAD_STORAGE = "torch.storage._load_from_bytes"
"""In a bare pickle, a tensor's values: a checkpoint within the checkpoint, opened by torch's restricted reader."""


class Bag:
    """Stands for a configuration's class: holds what the file says and does nothing."""


def load_checkpoint(path: Path, configuration: re.Pattern[str] = _NOTHING, *, bare: bool = False) -> Any:
    """Return what a checkpoint holds, mostly a mapping, with tensors on the CPU.

    Objects of classes whose full name ``configuration`` matches come back as a ``Bag``. With ``bare``, a pickle that
    torch did not write (``.pkl``, ``.pkl.gz``) is read too. Raises ArtifactMissing, ArtifactCorrupt, or
    ArtifactMismatch for another kind of file and for names that no such file needs.
    """
    if not path.is_file():
        raise ArtifactMissing(f"{path}: there is no such file; check the path and --from")
    if not bare and not zipfile.is_zipfile(path):
        raise ArtifactMismatch(
            f"{path}: is no checkpoint as torch writes them since 1.6; check --from, or save it again with torch"
        )
    try:
        return _load_zip(path, configuration) if zipfile.is_zipfile(path) else _load_bare(path, configuration)
    except ArtifactMismatch:
        raise
    except Exception as error:  # torch's reader and pickle's raise whatever the bytes lead them to
        raise ArtifactCorrupt(f"{path}: cannot be read as a checkpoint ({error}); get the file again") from error


def _load_zip(path: Path, configuration: re.Pattern[str]) -> Any:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    bags: list[Any] = [(Bag, name) for name in names if configuration.fullmatch(name)]
    numbers: list[Any] = [(_NUMBERS[name], name) for name in names if name in _NUMBERS]
    if strange := sorted(name for name in names if not configuration.fullmatch(name) and name not in _NUMBERS):
        raise _strange(path, strange)
    with torch.serialization.safe_globals([*bags, *numbers, *(_NUMBER_TYPES if numbers else ())]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _strange(path: Path, names: Sequence[str]) -> ArtifactMismatch:
    return ArtifactMismatch(
        f"{path}: asks for {', '.join(names)} to be loaded, which no such checkpoint needs and which could run "
        "anything; it is not opened"
    )


def _load_bare(path: Path, configuration: re.Pattern[str]) -> Any:
    with path.open("rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_compressed else path.open("rb") as file:
        return _Unpickler(file, path, configuration).load()


class _Call:
    """A function that a pickle may call, and may not change: an attribute set on the function would stay there."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Unpickler(pickle.Unpickler):
    """Builds tensors, plain values and bags; any other name in the file ends the reading before it is used."""

    def __init__(self, file: Any, path: Path, configuration: re.Pattern[str]) -> None:
        super().__init__(file)
        self._path, self._configuration = path, configuration

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for ``module.name``. Raises ArtifactMismatch unless such checkpoints need it."""
        wanted = f"{module}.{name}"
        if wanted == _LOAD_STORAGE:
            return _Call(_load_storage)
        if self._configuration.fullmatch(wanted):
            return type("Bag", (Bag,), {})
        known = {**_TENSOR_PARTS, **_NUMBERS}
        if wanted not in known:
            raise _strange(self._path, [wanted])
        return known[wanted] if isinstance(known[wanted], type | torch.dtype) else _Call(known[wanted])


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
