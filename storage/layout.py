"""The form of an array of the cache: its dtype, its sharding, its compression, and its Zarr metadata.

Every array is one-dimensional (one number per row) or two-dimensional (one vector per row) and is sharded along rows
only: a shard is one file of ``shard_rows`` rows, an inner chunk is ``chunk_rows`` full rows.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from typing import Any, cast

import numcodecs
import numpy as np
import zarr
import zarr.codecs
from numcodecs.abc import Codec
from zarr.storage import MemoryStore

from tailrace.storage.bfloat16 import BFloat16
from tailrace.storage.formats import Compression

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
