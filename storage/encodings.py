"""Encodings of one side of a site as Zarr arrays.

A float dtype is one array of the values as they are. int8 is a group of three plain arrays that any Zarr library
opens: ``q`` (rows, d) int8, ``scale`` (rows,) float32 and ``column_scale`` (d,) float32, with
value ≈ q · scale[row] · column_scale[dimension]. Dividing each column by its typical size first is what keeps small
dimensions alive beside the outlier dimensions of a language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tailrace.storage.formats import Compression
from tailrace.storage.layout import ArraySpec
from tailrace.storage.memory import aligned_rows

Side = Literal["in", "out"]


@dataclass(frozen=True)
class Encoding:
    """The arrays that hold one side of one site; encodes rows into them and decodes them."""

    name: str
    """Path below the split's group, e.g. ``sites/layer8/in``."""
    dtype: str
    """bfloat16, float16, float32 or int8."""
    width: int
    column_scale: np.ndarray | None = None
    """float32 (d,): int8 only."""

    def specs(self, shard_rows: int, chunk_rows: int, compression: Compression) -> tuple[ArraySpec, ...]:
        """Return the sharded arrays this side needs."""
        if self.dtype != "int8":
            return (ArraySpec(self.name, self.dtype, self.width, shard_rows, chunk_rows, compression),)
        return (
            ArraySpec(f"{self.name}/q", "int8", self.width, shard_rows, chunk_rows, compression),
            ArraySpec(f"{self.name}/scale", "float32", None, shard_rows, chunk_rows, compression),
        )

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return stored rows by array name. ``rows`` (n, d): the memory dtype of a float dtype, float32 for int8."""
        if self.dtype != "int8":
            return {self.name: rows}
        assert self.column_scale is not None
        scaled = rows / self.column_scale
        largest = np.abs(scaled).max(axis=1)
        # no smaller than a normal float32: a subnormal step is too coarse to keep q within 127
        scale = np.maximum(np.where(largest > 0, largest, 1.0) / 127.0, np.finfo(np.float32).tiny).astype(np.float32)
        return {f"{self.name}/q": np.rint(scaled / scale[:, None]).astype(np.int8), f"{self.name}/scale": scale}

    def decode(self, stored: Mapping[str, np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
        """Return rows from stored rows: the array itself for a float dtype, float32 values for int8."""
        if self.dtype != "int8":
            return np.asarray(stored[self.name])
        assert self.column_scale is not None
        rows = stored[f"{self.name}/q"]
        values: np.ndarray = np.empty(rows.shape, np.float32) if out is None else out[: len(rows)]
        np.multiply(rows, stored[f"{self.name}/scale"][:, None], out=values)
        values *= self.column_scale
        return values

    def decode_buffer(self, n_rows: int) -> np.ndarray | None:
        """Return memory for ``decode(out=)``, or None where decoding copies nothing."""
        return aligned_rows(n_rows, self.width, np.dtype(np.float32)) if self.dtype == "int8" else None


def column_scale_of(total_squares: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the int8 column scale, float32 (d,): the root mean square of each dimension, 1 where it is zero."""
    rms = np.sqrt(total_squares / n_rows)
    return np.asarray(np.where(rms > 0, rms, 1.0), np.float32)


RELATIVE_ERROR: dict[str, float] = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.02}
"""Largest relative error ‖stored − value‖/‖value‖ of one row by storing: half a unit in the last place for the floats
(a value that the dtype holds exactly has none); for int8 half a step of 1/127 of the row's largest scaled value in
every column, up to √d/254 of a row that is one spike and about 0.01 for real rows."""

FLOAT16_NORMAL = float(np.finfo(np.float16).smallest_normal)
"""Root mean square of a row below which its float16 values are further off than ``RELATIVE_ERROR`` says: float16 has
steps of 2⁻²⁴ there, however small the value."""


def relative_error(difference: float, size: float) -> float:
    """Return one norm as a share of another: 0 for no difference, also between zeros; infinity where ``size`` is 0.

    NaN stays NaN, which is within no tolerance.
    """
    if size == 0:
        return difference * float("inf") if difference else 0.0
    return difference / size
