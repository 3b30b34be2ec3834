"""The form of an array of the cache: its dtype, its sharding, its compression, and its Zarr metadata.

Every array is one-dimensional (one number per row) or two-dimensional (one vector per row) and is sharded along rows
only: a shard is one file of ``shard_rows`` rows, an inner chunk is ``chunk_rows`` full rows.

Encodings of one side of a site as Zarr arrays.

A float dtype is one array of the values as they are. int8 is a group of three plain arrays that any Zarr library
opens: ``q`` (rows, d) int8, ``scale`` (rows,) float32 and ``column_scale`` (d,) float32, with
value ≈ q · scale[row] · column_scale[dimension]. Dividing each column by its typical size first is what keeps small
dimensions alive beside the outlier dimensions of a language model.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numcodecs
import numpy as np
import zarr
import zarr.codecs
from numcodecs.abc import Codec
from zarr.storage import MemoryStore

from tailrace.storage.bfloat16 import BFloat16
from tailrace.storage.formats import Compression
from tailrace.storage.memory import aligned_rows

MEMORY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
}
"""The NumPy dtype that holds each Zarr data type in memory."""


@dataclass(frozen=True)
class ArraySpec:
    """One sharded Zarr array, apart from how many rows it has."""

    name: str
    """Path below the split's group, e.g. ``sites/layer8/in``."""
    dtype: str
    """Zarr data type."""
    width: int | None
    """Numbers per row; None for a one-dimensional array."""
    shard_rows: int
    chunk_rows: int
    compression: Compression = "none"

    @property
    def memory_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of rows in memory."""
        return MEMORY_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        return self.memory_dtype.itemsize * (1 if self.width is None else self.width)

    @property
    def chunk_bytes(self) -> int:
        """Uncompressed bytes of one inner chunk."""
        return self.row_bytes * self.chunk_rows

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks in one shard."""
        return self.shard_rows // self.chunk_rows

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """Return the array's shape with ``n_rows`` rows."""
        return (n_rows,) if self.width is None else (n_rows, self.width)

    def shard_name(self, unit: int) -> str:
        """Return the path, below the split's group, of one shard file."""
        return f"{self.name}/c/{unit}" + ("" if self.width is None else "/0")


class _GZip:
    """gzip at level 1 without the time that numcodecs writes, so that equal rows give equal bytes."""

    def encode(self, chunk: np.ndarray) -> bytes:
        written = io.BytesIO()
        with gzip.GzipFile(fileobj=written, mode="wb", compresslevel=1, mtime=0) as file:
            file.write(chunk.data)
        return written.getvalue()


def codec_of(compression: Compression, item_bytes: int) -> Codec | None:
    """Return the numcodecs codec that encodes one inner chunk, or None."""
    shuffle = numcodecs.Blosc.BITSHUFFLE
    match compression:
        case "none":
            return None
        case "lz4":
            return numcodecs.Blosc("lz4", clevel=5, shuffle=shuffle, typesize=item_bytes)
        case "blosc-zstd":
            return numcodecs.Blosc("zstd", clevel=1, shuffle=shuffle, typesize=item_bytes)
        case "zstd":
            return numcodecs.Zstd(level=1)
        case "gzip":
            return _GZip()


def _zarr_codecs(spec: ArraySpec) -> list[Any]:
    item_bytes = spec.memory_dtype.itemsize
    match spec.compression:
        case "none":
            return []
        case "lz4":
            return [zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=item_bytes)]
        case "blosc-zstd":
            return [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=item_bytes)]
        case "zstd":
            return [zarr.codecs.ZstdCodec(level=1)]
        case "gzip":
            return [zarr.codecs.GzipCodec(level=1)]


def array_metadata(spec: ArraySpec, n_rows: int, attributes: dict[str, Any]) -> bytes:
    """Return the ``zarr.json`` of an array whose shards ``tailrace.storage.shard`` writes."""
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=spec.shape(n_rows),
        shards=spec.shape(spec.shard_rows),
        chunks=spec.shape(spec.chunk_rows),
        dtype=cast("Any", BFloat16() if spec.dtype == "bfloat16" else spec.dtype),
        compressors=_zarr_codecs(spec),
        filters=[],
        fill_value=0,
        zarr_format=3,
        attributes=attributes,
        dimension_names=["row"] if spec.width is None else ["row", "dimension"],
    )
    return _stored_metadata(store)


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return the ``zarr.json`` of a group."""
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3, attributes=attributes)
    return _stored_metadata(store)


def small_array_files(values: np.ndarray, attributes: dict[str, Any]) -> dict[str, bytes]:
    """Return the files, by name below the array's folder, of a small array in one uncompressed chunk."""
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        compressors=None,
        filters=[],
        zarr_format=3,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return {name: cast("Any", stored).to_bytes() for name, stored in store._store_dict.items()}


def _stored_metadata(store: MemoryStore) -> bytes:
    return bytes(cast("Any", store._store_dict["zarr.json"]).to_bytes())


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
