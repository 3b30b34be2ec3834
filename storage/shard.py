"""A shard file: writing it durably, proving its layout, reading rows from it.

An uncompressed Zarr v3 shard is ``rows ‖ index ‖ crc32c`` and nothing else, so it is written past the page cache
and read with positioned reads, both at the speed of the disk; a shard whose index does not prove that layout is
damaged. Compressed shards are read through zarr-python.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash
import zarr
from zarr.storage import LocalStore

from tailrace.storage.artifact import FileRecord, is_disk_refusal, make_directory, storage_refused
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.layout import ArraySpec, codec_of
from tailrace.storage.memory import PAGE, aligned_rows, as_bytes, read_run, read_sequential
from tailrace.storage.names import discard, temporary_path
from tailrace.storage.shuffle import Run

_BLOCK_BYTES = 8 << 20
_EMPTY_CHUNK = 2**64 - 1
_DIRECT = getattr(os, "O_DIRECT", 0)


def rows_to_chunks(spec: ArraySpec, n_rows: int) -> int:
    """Return how many inner chunks hold ``n_rows`` rows."""
    return -(-n_rows // spec.chunk_rows)


def shard_footer(spec: ArraySpec, chunk_sizes: list[int]) -> bytes:
    """Return the index and its checksum for chunks of these encoded sizes, laid one after the other from 0."""
    index = np.full((spec.chunks_per_shard, 2), _EMPTY_CHUNK, "<u8")
    ends = np.cumsum(chunk_sizes, dtype=np.uint64)
    index[: len(chunk_sizes), 0] = ends - np.asarray(chunk_sizes, np.uint64)
    index[: len(chunk_sizes), 1] = chunk_sizes
    encoded = index.tobytes()
    return encoded + int(google_crc32c.value(encoded)).to_bytes(4, "little")


def write_shard(path: Path, rows: np.ndarray, n_rows: int, spec: ArraySpec) -> FileRecord:
    """Write the first ``n_rows`` of ``rows`` as the shard file ``path``: synced, then renamed into place.

    ``rows`` is (at least n_rows rounded up to chunks, width), page-aligned, zero beyond
    ``n_rows``. Raises StorageFull.
    """
    temporary = temporary_path(path)
    n_chunks = rows_to_chunks(spec, n_rows)
    try:
        make_directory(path.parent)
        codec = codec_of(spec.compression, spec.memory_dtype.itemsize)
        if codec is None:
            body = as_bytes(rows[: n_chunks * spec.chunk_rows])
            written = _write_file(temporary, body, shard_footer(spec, [spec.chunk_bytes] * n_chunks))
        else:
            chunks = [rows[i * spec.chunk_rows : (i + 1) * spec.chunk_rows] for i in range(n_chunks)]
            encoded = [bytes(codec.encode(np.ascontiguousarray(chunk))) for chunk in chunks]
            body = memoryview(b"".join(encoded))
            written = _write_file(temporary, body, shard_footer(spec, [len(chunk) for chunk in encoded]))
        temporary.rename(path)
    except OSError as error:
        discard(temporary)
        if is_disk_refusal(error):
            raise storage_refused(error, path) from error
        raise
    return written


def _write_file(path: Path, body: memoryview, footer: bytes) -> FileRecord:
    """Write ``body ‖ footer`` past the page cache where the file system allows, checksumming beside the writing."""
    direct_bytes = len(body) - len(body) % PAGE
    tail = bytes(body[direct_bytes:]) + footer
    n_bytes = direct_bytes + len(tail)
    hasher = xxhash.xxh3_128()
    with ThreadPoolExecutor(1) as checksummer:
        checksum = checksummer.submit(_update, hasher, body[:direct_bytes], tail)
        descriptor, direct = _open_for_writing(path, aligned=_is_aligned(body))
        try:
            _reserve(descriptor, n_bytes)
            if direct:
                _write_directly(descriptor, body[:direct_bytes])
                _leave_direct_mode(descriptor)
            else:
                _write_blocks(descriptor, body[:direct_bytes], 0)
            _write_blocks(descriptor, memoryview(tail), direct_bytes)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        return FileRecord(bytes=n_bytes, checksum=checksum.result())


def _update(hasher: xxhash.xxh3_128, body: memoryview, tail: bytes) -> str:
    for start in range(0, len(body), _BLOCK_BYTES):
        hasher.update(body[start : start + _BLOCK_BYTES])
    hasher.update(tail)
    return "xxh3:" + hasher.hexdigest()


def _is_aligned(body: memoryview) -> bool:
    return len(body) > 0 and np.frombuffer(body, np.uint8).ctypes.data % PAGE == 0


def _open_for_writing(path: Path, *, aligned: bool) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if aligned and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o644), True
        except OSError as error:
            # tmpfs and some network file systems refuse O_DIRECT when opening
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    return os.open(path, flags, 0o644), False


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Reserve the space at once: a full disk shows before anything is written, and the file is not fragmented."""
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        # file systems that cannot reserve: the C library then writes single bytes, which O_DIRECT refuses
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _write_directly(descriptor: int, data: memoryview) -> None:
    """Write past the page cache; through it where the file system takes O_DIRECT but not this alignment."""
    try:
        _write_blocks(descriptor, data, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _leave_direct_mode(descriptor)
        _write_blocks(descriptor, data, 0)


def _write_blocks(descriptor: int, data: memoryview, start: int) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(descriptor, data[offset : offset + _BLOCK_BYTES], start + offset)


def _leave_direct_mode(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)


def open_shard(path: Path, n_rows: int, spec: ArraySpec) -> FileIO:
    """Open an uncompressed shard, whose ``n_rows`` rows lie one after the other from byte 0.

    Raises ArtifactCorrupt unless the shard's own index proves that.
    """
    with shard_errors(path):
        file = FileIO(path, "rb")
        try:
            if not _is_contiguous(file.fileno(), n_rows, spec):
                raise _not_contiguous(path, n_rows)
        except BaseException:
            file.close()
            raise
    return file


def _not_contiguous(path: Path, n_rows: int) -> ArtifactCorrupt:
    return _damaged(path, f"its index is not that of {n_rows:,} rows that lie one after the other")


@lru_cache(maxsize=64)
def _contiguous_footer(spec: ArraySpec, n_chunks: int) -> bytes:
    """Return the index of an uncompressed shard, of which a cache has two for every array: full, and last."""
    return shard_footer(spec, [spec.chunk_bytes] * n_chunks)


def _is_contiguous(descriptor: int, n_rows: int, spec: ArraySpec) -> bool:
    n_chunks = rows_to_chunks(spec, n_rows)
    footer = _contiguous_footer(spec, n_chunks)
    start = n_chunks * spec.chunk_bytes
    if os.fstat(descriptor).st_size != start + len(footer):
        return False
    return os.pread(descriptor, len(footer), start) == footer


def read_rows(group: Path, spec: ArraySpec, unit: int, n_rows: int) -> np.ndarray:
    """Return all ``n_rows`` rows of one shard, in stored order, as a new array. Raises ArtifactCorrupt."""
    rows = aligned_rows(n_rows, spec.width, spec.memory_dtype)
    path = group / spec.shard_name(unit)
    if spec.compression != "none":
        rows[...] = read_zarr(group, spec, unit * spec.shard_rows, unit * spec.shard_rows + n_rows)
        return rows
    with shard_errors(path), open_shard(path, n_rows, spec) as file:
        read_sequential(file.fileno(), 0, rows)
    return rows


def read_run_of_shard(group: Path, spec: ArraySpec, n_rows: int, run: Run, rows: np.ndarray) -> None:
    """Read a run of a shard of ``n_rows`` rows straight to its positions in ``rows``. Raises ArtifactCorrupt."""
    if spec.compression != "none":
        first = run.unit * spec.shard_rows
        rows[run.destinations] = read_zarr(group, spec, first + run.start, first + run.stop)
        return
    path = group / spec.shard_name(run.unit)
    with shard_errors(path), open_shard(path, n_rows, spec) as file:
        _advise_random(file.fileno())
        read_run(file.fileno(), run.start, rows, run.destinations)


def read_part_of_shard(group: Path, spec: ArraySpec, unit: int, n_rows: int, start: int, rows: np.ndarray) -> None:
    """Fill ``rows`` from row ``start`` of a shard of ``n_rows`` rows on. Raises ArtifactCorrupt."""
    if spec.compression != "none":
        first = unit * spec.shard_rows + start
        rows[...] = read_zarr(group, spec, first, first + len(rows))
        return
    name = f"{group}/{spec.shard_name(unit)}"  # many short runs are read: what a Path and a file object cost is felt
    try:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            if not _is_contiguous(descriptor, n_rows, spec):
                raise _not_contiguous(Path(name), n_rows)
            _advise_random(descriptor)
            read_sequential(descriptor, start, rows)
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        raise _damaged(Path(name), error) from error


def _advise_random(descriptor: int) -> None:
    """Turn off read-ahead, which would fetch the neighbours of every run; they belong to other buckets."""
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def read_zarr(group: Path, spec: ArraySpec, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of one shard through zarr-python, whatever its codecs and the order of its chunks.

    Raises ArtifactCorrupt for a shard that is missing, which Zarr would read as zeros, or cannot be decoded.
    """
    path = group / spec.shard_name(start // spec.shard_rows)
    with shard_errors(path):
        path.stat()
        try:
            return np.asarray(_open_zarr(group / spec.name)[start:stop])
        except (RuntimeError, ValueError, zlib.error) as error:
            # what the codecs of zarr-python and zarrs raise for bytes they did not write
            raise _damaged(path, error) from error


_opening = threading.Lock()


def _open_zarr(path: Path) -> Any:
    # an array keeps the codec pipeline it was opened with; the lock keeps threads from restoring each other's setting
    with _opening, zarr.config.set(_zarr_pipeline()):
        return zarr.open_array(LocalStore(path, read_only=True), mode="r")


@contextmanager
def shard_errors(path: Path) -> Iterator[None]:
    """Raise ArtifactCorrupt naming the shard where reading it fails."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception | str) -> ArtifactCorrupt:
    return ArtifactCorrupt(
        f"{path}: a shard is missing, cut short or unreadable ({error}); run `pipeline verify` to list all damage, "
        "then restore the file or cache these rows again"
    )


@cache
def _zarr_pipeline() -> dict[str, Any]:
    """Prefer the zarrs codec pipeline, several times faster than zarr-python's own, where it is installed."""
    if importlib.util.find_spec("zarrs") is None:
        return {}
    return {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
