"""Shard files are plain Zarr v3: every library reads the same bytes, and damage never passes for data."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.storage import LocalStore

from tailrace.storage import shard
from tailrace.storage.artifact import checksum_file
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.storage.errors import ArtifactCorrupt, StorageFull
from tailrace.storage.formats import Compression
from tailrace.storage.layout import ArraySpec, array_metadata, group_metadata
from tailrace.storage.memory import aligned_rows
from tailrace.storage.shard import open_shard, read_rows, read_zarr, shard_footer, write_shard

DTYPES = ("float32", "float16", "bfloat16", "int8")
COMPRESSIONS: tuple[Compression, ...] = ("none", "lz4", "zstd", "gzip", "blosc-zstd")
N_ROWS = 300
"""Two whole shards of 128 rows and one of 44, which is one whole chunk of 32 and 12 rows of another."""


def stored_rows(dtype: str, width: int | None = 24, n_rows: int = N_ROWS) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(1))
    values = generator.standard_normal((n_rows, width or 1)).astype(np.float32) * 20
    values = values[:, 0] if width is None else values
    if dtype == "bfloat16":
        return float32_to_bits(values)
    return values.astype(dtype)


def write_array(group: Path, spec: ArraySpec, rows: np.ndarray) -> None:
    for unit in range(-(-len(rows) // spec.shard_rows)):
        piece = rows[unit * spec.shard_rows :][: spec.shard_rows]
        buffer = aligned_rows(spec.shard_rows, spec.width, spec.memory_dtype)
        buffer[: len(piece)] = piece
        write_shard(group / spec.shard_name(unit), buffer, len(piece), spec)
    (group / spec.name / "zarr.json").write_bytes(array_metadata(spec, len(rows), {}))
    (group / "zarr.json").write_bytes(group_metadata({}))


def read_units(group: Path, spec: ArraySpec, n_rows: int) -> np.ndarray:
    starts = range(0, n_rows, spec.shard_rows)
    return np.concatenate(
        [read_rows(group, spec, unit, min(spec.shard_rows, n_rows - start)) for unit, start in enumerate(starts)]
    )


def open_tensorstore(path: Path) -> Any:
    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}).result()


def read_with(pipeline: str) -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            return np.asarray(zarr.open_array(LocalStore(path, read_only=True), mode="r")[...])

    return read


def read_tensorstore(path: Path) -> np.ndarray:
    rows = np.asarray(open_tensorstore(path).read().result())
    # tensorstore gives bfloat16 a type of its own; its bits are what the other libraries return
    return rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows


READERS = {
    "zarr-python": read_with("zarr.core.codec_pipeline.BatchedCodecPipeline"),
    "zarrs": read_with("zarrs.ZarrsCodecPipeline"),
    "tensorstore": read_tensorstore,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_same_rows_are_the_same_bytes_at_any_time(
    tmp_path: Path, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ArraySpec("site", "float32", 24, shard_rows=128, chunk_rows=32, compression=compression)
    written = []
    for second in (1_000_000_000, 1_000_000_001):
        monkeypatch.setattr("time.time", lambda now=second: float(now))
        write_array(tmp_path, spec, stored_rows("float32", n_rows=128))
        written.append((tmp_path / spec.shard_name(0)).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_library_reads_the_rows_that_were_written(tmp_path: Path, dtype: str, compression: Compression) -> None:
    spec = ArraySpec("rows", dtype, 24, 128, 32, compression)
    rows = stored_rows(dtype)
    write_array(tmp_path, spec, rows)
    for name, read in READERS.items():
        found = read(tmp_path / "rows")
        assert found.dtype == rows.dtype, name
        assert found.tobytes() == rows.tobytes(), name
    assert read_units(tmp_path, spec, N_ROWS).tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint16"])
def test_every_library_reads_one_number_per_row(tmp_path: Path, dtype: str) -> None:
    spec = ArraySpec("rows", dtype, None, 128, 32)
    rows = np.abs(stored_rows("float32", None)).astype(dtype)
    write_array(tmp_path, spec, rows)
    for name, read in READERS.items():
        assert np.array_equal(read(tmp_path / "rows"), rows), name


def test_tensorstore_sees_bfloat16_as_bfloat16(tmp_path: Path) -> None:
    spec = ArraySpec("rows", "bfloat16", 24, 128, 32)
    write_array(tmp_path, spec, stored_rows("bfloat16"))
    assert open_tensorstore(tmp_path / "rows").dtype == tensorstore.bfloat16


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_written_by_zarr_python_are_read(tmp_path: Path, dtype: str, compression: Compression) -> None:
    spec = ArraySpec("rows", dtype, 24, 128, 32, compression)
    rows = stored_rows(dtype)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "zarr.json").write_bytes(array_metadata(spec, N_ROWS, {}))
    zarr.open_array(LocalStore(tmp_path / "rows"), mode="r+")[...] = rows
    assert read_units(tmp_path, spec, N_ROWS).tobytes() == rows.tobytes()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_written_by_tensorstore_are_read(tmp_path: Path, dtype: str, compression: Compression) -> None:
    spec = ArraySpec("rows", dtype, 24, 128, 32, compression)
    rows = stored_rows(dtype)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "zarr.json").write_bytes(array_metadata(spec, N_ROWS, {}))
    written = rows.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else rows
    open_tensorstore(tmp_path / "rows").write(written).result()
    assert read_units(tmp_path, spec, N_ROWS).tobytes() == rows.tobytes()


def test_a_shard_is_rows_then_index_then_checksum(tmp_path: Path) -> None:
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    rows = stored_rows("float32")
    write_array(tmp_path, spec, rows)
    last = (tmp_path / spec.shard_name(2)).read_bytes()
    padded = np.zeros((64, 24), np.float32)
    padded[:44] = rows[256:]
    chunk = 32 * 24 * 4
    absent = 2**64 - 1
    index = np.array([[0, chunk], [chunk, chunk], [absent, absent], [absent, absent]], "<u8")
    assert last[: 2 * chunk] == padded.tobytes()
    assert last[2 * chunk : 2 * chunk + 64] == index.tobytes()
    assert len(last) == 2 * chunk + 64 + 4


def test_the_recorded_checksum_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    for compression in COMPRESSIONS:
        spec = ArraySpec(f"rows-{compression}", "float32", 24, 128, 32, compression)
        buffer = aligned_rows(128, 24, spec.memory_dtype)
        buffer[...] = stored_rows("float32", n_rows=128)
        written = write_shard(tmp_path / spec.shard_name(0), buffer, 100, spec)
        assert written.checksum == checksum_file(tmp_path / spec.shard_name(0))
        assert written.bytes == (tmp_path / spec.shard_name(0)).stat().st_size


def test_rows_do_not_depend_on_where_their_memory_begins(tmp_path: Path) -> None:
    # memory that is not page-aligned cannot be written with O_DIRECT
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    aligned = aligned_rows(128, 24, spec.memory_dtype)
    aligned[...] = stored_rows("float32", n_rows=128)
    shifted = np.empty(128 * 24 + 1, np.float32)[1:].reshape(128, 24)
    shifted[...] = aligned
    write_shard(tmp_path / "aligned", aligned, 128, spec)
    write_shard(tmp_path / "shifted", shifted, 128, spec)
    assert (tmp_path / "aligned").read_bytes() == (tmp_path / "shifted").read_bytes()


def test_a_file_system_that_refuses_direct_writing_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    rows = aligned_rows(128, 24, spec.memory_dtype)
    rows[...] = stored_rows("float32", n_rows=128)
    write_shard(tmp_path / "direct", rows, 128, spec)
    really_open, refused = os.open, []

    def refuse_direct(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & shard._DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, mode)

    monkeypatch.setattr(shard, "_DIRECT", os.O_DIRECT)
    monkeypatch.setattr(os, "open", refuse_direct)
    write_shard(tmp_path / "buffered", rows, 128, spec)
    assert len(refused) == 1
    assert (tmp_path / "buffered").read_bytes() == (tmp_path / "direct").read_bytes()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_space_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # the C library imitates the call with one-byte writes, which O_DIRECT refuses with EINVAL
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    rows = aligned_rows(128, 24, spec.memory_dtype)
    rows[...] = stored_rows("float32", n_rows=128)
    write_shard(tmp_path / "reserved", rows, 128, spec)

    def refuse(descriptor: int, offset: int, n_bytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_shard(tmp_path / "plain", rows, 128, spec)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "reserved").read_bytes()


def test_writes_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    rows = aligned_rows(128, 24, spec.memory_dtype)
    rows[...] = stored_rows("float32", n_rows=128)
    write_shard(tmp_path / "at once", rows, 128, spec)
    whole = os.pwrite
    monkeypatch.setattr(shard, "_DIRECT", 0)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:17], offset))
    write_shard(tmp_path / "in pieces", rows, 128, spec)
    assert (tmp_path / "in pieces").read_bytes() == (tmp_path / "at once").read_bytes()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_keeps_the_old_shard_and_leaves_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    # injected: what a full disk answers, at each call that may get the answer
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    rows = aligned_rows(128, 24, spec.memory_dtype)
    write_shard(tmp_path / "shard", rows, 128, spec)
    before = (tmp_path / "shard").read_bytes()

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    rows[...] = 1
    with pytest.raises(
        StorageFull, match=r"shard: cannot be written \(No space left on device\).*run the same command"
    ):
        write_shard(tmp_path / "shard", rows, 128, spec)
    assert (tmp_path / "shard").read_bytes() == before
    assert os.listdir(tmp_path) == ["shard"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_refused_unless_the_index_proves_the_layout(tmp_path: Path, dtype: str) -> None:
    spec = ArraySpec("rows", dtype, 24, 128, 32)
    rows = stored_rows(dtype, n_rows=128)
    write_array(tmp_path, spec, rows)
    path = tmp_path / spec.shard_name(0)
    open_shard(path, 128, spec).close()
    # the same chunks in another order, which Zarr allows: chunk 1 first
    data, chunk = path.read_bytes(), spec.chunk_bytes
    index = np.array([[chunk, chunk], [0, chunk], [2 * chunk, chunk], [3 * chunk, chunk]], "<u8").tobytes()
    checksum = int(google_crc32c.value(index)).to_bytes(4, "little")
    path.write_bytes(data[chunk : 2 * chunk] + data[:chunk] + data[2 * chunk : 4 * chunk] + index + checksum)
    with pytest.raises(ArtifactCorrupt, match="its index is not that of 128 rows that lie one after the other"):
        read_rows(tmp_path, spec, 0, 128)
    assert np.array_equal(read_zarr(tmp_path, spec, 0, 128), rows)


def test_a_shard_of_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    # another generation's shard in this one's place must not be read as far as it goes
    spec = ArraySpec("rows", "float32", 24, 128, 32)
    write_array(tmp_path, spec, stored_rows("float32", n_rows=128))
    with pytest.raises(ArtifactCorrupt, match="its index is not that of 44 rows"):
        read_rows(tmp_path, spec, 0, 44)


def test_the_footer_counts_only_the_chunks_that_hold_rows() -> None:
    spec = ArraySpec("rows", "float32", 2, 128, 32)
    assert len(shard_footer(spec, [256, 256])) == 4 * 16 + 4
    assert shard_footer(spec, [256, 256])[16:32] == (256).to_bytes(8, "little") * 2
    assert shard_footer(spec, [256, 256])[32:64] == b"\xff" * 32


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        cut = {"cut short": data[:-100], "empty": b"", "wrong checksum": data[:-1] + bytes([data[-1] ^ 1])}
        path.write_bytes(cut[how])


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "wrong checksum"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_shard_is_named_and_never_read_as_zeros(tmp_path: Path, compression: Compression, how: str) -> None:
    spec = ArraySpec("rows", "float32", 24, 128, 32, compression)
    write_array(tmp_path, spec, stored_rows("float32"))
    damage(tmp_path / spec.shard_name(1), how)
    with pytest.raises(ArtifactCorrupt, match=r"rows/c/1/0.*pipeline verify"):
        read_rows(tmp_path, spec, 1, 128)
    with pytest.raises(ArtifactCorrupt, match=r"rows/c/1/0.*pipeline verify"):
        read_zarr(tmp_path, spec, 130, 140)


@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip", "blosc-zstd"])
@pytest.mark.parametrize("pipeline", ["zarrs", "zarr-python"])
def test_a_chunk_that_cannot_be_decoded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression, pipeline: str
) -> None:
    if pipeline == "zarr-python":
        monkeypatch.setattr(shard, "_zarr_pipeline", dict)
    spec = ArraySpec("rows", "float32", 24, 128, 32, compression)
    write_array(tmp_path, spec, stored_rows("float32"))
    path = tmp_path / spec.shard_name(1)
    data = bytearray(path.read_bytes())
    data[:64] = bytes(byte ^ 0xFF for byte in data[:64])
    path.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match="rows/c/1/0"):
        read_rows(tmp_path, spec, 1, 128)


def test_reading_through_zarr_in_threads_leaves_the_callers_configuration_alone(tmp_path: Path) -> None:
    spec = ArraySpec("rows", "float32", 24, 128, 32, "zstd")
    write_array(tmp_path, spec, stored_rows("float32"))
    before = zarr.config.get("codec_pipeline.path")

    def read_often() -> None:
        for _ in range(20):
            read_rows(tmp_path, spec, 0, 128)

    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert zarr.config.get("codec_pipeline.path") == before


def test_a_file_system_that_refuses_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ArraySpec("a", "float32", 256, 64, 16)
    rows = aligned_rows(64, 256, np.dtype(np.float32))
    rows[...] = np.arange(64 * 256).reshape(64, 256)
    wanted = write_shard(tmp_path / "wanted", rows, 64, spec)
    write = os.pwrite

    def refuse_direct(descriptor: int, data: memoryview, offset: int) -> int:  # an injected refusal
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse_direct)
    assert write_shard(tmp_path / "found", rows, 64, spec) == wanted
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()
