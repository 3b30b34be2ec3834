"""docs/format.md is the format: its tables and real caches say the same, its rules give the order that is served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import xxhash
import zarr

from tailrace.pipeline.cache.context_packing import CHECKPOINT
from tailrace.pipeline.cache.draft import LOG, PLAN
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import canonical_json
from tailrace.storage.cache_format import BEGUN, documents_name, packing_name, seal_path
from tailrace.storage.formats import Compression
from tailrace.storage.generations import PRUNED
from tailrace.storage.layout import ArraySpec, array_metadata
from tailrace.storage.materialise import materialise_epoch
from tailrace.storage.names import LOCK
from tests.support.paths import DOCS
from tests.support.synthetic_cache import extend_in_steps, memory_directory, widen_in_steps, write_synthetic_cache

DOCUMENT = (DOCS / "format.md").read_text(encoding="utf-8")
PLACEHOLDERS = {
    "split": "(?:train|heldout)",
    "array": r"(?:(?:token_id|context|position|document)|(?:sites|contexts)/[\w/]+?)",
    "side": "(?:in|out)",
    "statistic": "(?:mean|variance)",
    "site": r"\w+",
}
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "string or null": (str, type(None)),
}


def table(heading: str, which: int = 0) -> list[list[str]]:
    """Return the rows of a table below a heading, cells without code marks."""
    section = re.split(r"^#+ ", DOCUMENT.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    blocks = re.findall(r"^\|.*?\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", section, re.M)
    rows = blocks[which].splitlines()
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


@pytest.fixture(scope="module")
def caches() -> Iterator[list[ActivationCache]]:
    """A cache that was extended, widened and materialised, and one with compression; all dtypes between them."""
    with memory_directory() as directory:
        path = Path(directory) / "grown"
        write_synthetic_cache(path, dtype="int8", n_contexts=12, n_heldout_contexts=2, shard_rows=64, bucket_rows=64)
        for _ in extend_in_steps(path, n_contexts=20):
            pass
        for dtype in ("float16", "bfloat16"):
            for _ in widen_in_steps(path, widths=[(f"{dtype}_site", 4, 6)], dtype=dtype):
                pass
        for split in ("train", "heldout"):
            materialise_epoch(open_cache(path).split(split), seed=3, epoch=1, run_tasks=in_turn)
        plain = write_synthetic_cache(Path(directory) / "plain", compression="gzip", sae=True, seed=7, bucket_rows=128)
        yield [open_cache(path), plain]


def test_every_file_is_documented_and_every_documented_file_exists(caches: list[ActivationCache]) -> None:
    patterns = {path: re.compile(pattern_of(path)) for path, _ in table("Files")}
    found = set()
    for cache in caches:
        for file in cache.path.rglob("*"):
            name = file.relative_to(cache.path).as_posix()
            if not file.is_file() or name == LOCK or name.endswith(f"/{LOCK}") or is_metadata(name):
                continue
            matching = [path for path, pattern in patterns.items() if pattern.fullmatch(name)]
            assert matching, name
            found.update(matching)
    assert found == patterns.keys()


def pattern_of(path: str) -> str:
    pattern = re.escape(path).replace("000000", r"\d{6}")
    return re.sub(r"<(\w+)>", lambda match: PLACEHOLDERS.get(match[1], r"\d+"), pattern)


def is_metadata(name: str) -> bool:
    """Tell whether a file is Zarr metadata that the document describes by a rule, not by a row of its own."""
    return name.endswith("/zarr.json") and not re.fullmatch(r"epochs/[^/]+/zarr\.json", name)


def test_every_array_and_every_folder_above_one_has_its_metadata(caches: list[ActivationCache]) -> None:
    for cache in caches:
        for chunks in cache.path.rglob("c"):
            assert (chunks.parent / "zarr.json").is_file()
            top = chunks.relative_to(cache.path).parts[0]
            last = cache.path if top in ("train", "heldout") else cache.path / "epochs"
            folders = [] if top in ("superseded", "statistics") else chunks.parent.parents
            for folder in folders:
                if folder == last:
                    break
                assert (folder / "zarr.json").is_file(), folder


def test_what_the_pipeline_adds_is_documented() -> None:
    kept = documents_name(0, "<split>", 0).replace("/0/", "/<generation>/")
    written = [packing_name(0).replace("0", "<generation>"), kept, LOG, BEGUN, PLAN, CHECKPOINT, LOCK, PRUNED]
    written.append(seal_path(Path(), "<file>").as_posix())
    assert sorted(path for path, _ in table("Files", 1)) == sorted(written)  # each once


def arrays_of(group: zarr.Group, prefix: str = "") -> Iterator[tuple[str, zarr.Array]]:
    for name, member in group.members():
        if isinstance(member, zarr.Array):
            yield prefix + name, member
        else:
            yield from arrays_of(member, f"{prefix}{name}/")


def test_every_array_is_as_documented(caches: list[ActivationCache]) -> None:
    documented = {re.compile(pattern_of(row[0])): row for row in table("Arrays")}
    found = set()
    for cache in caches:
        layout = cache.layout
        for split_name in cache.manifest.splits:
            split = cache.split(split_name)
            sizes: dict[str, int | None] = {
                "n": split.n_rows,
                "C": split.n_contexts,
                "T": layout.context_length,
                "shard_rows": layout.shard_rows,
                "chunk_rows": layout.chunk_rows,
                "block_contexts": layout.block_contexts,
                "min(block_contexts, 256)": min(layout.block_contexts, 256),
                "–": None,
            }
            for name, array in arrays_of(zarr.open_group(cache.path / split_name, mode="r")):
                (row,) = (row for pattern, row in documented.items() if pattern.fullmatch(name))
                found.add(row[0])
                key = "/".join(name.split("/")[1:3])
                sizes["width"] = layout.encodings()[key].width if name.startswith("sites") else None
                check_array(array, row, sizes)
    assert found == {row[0] for row in table("Arrays")}


def check_array(array: zarr.Array, row: list[str], sizes: dict[str, int | None]) -> None:
    name, dtype, shape, shard, chunk, _ = row
    metadata: Any = array.metadata.to_dict()
    assert metadata["data_type"] in re.split(", | or ", dtype), name
    assert list(array.shape) == [sizes[size] for size in shape.split(" × ")], name
    assert array.chunks[0] == sizes[chunk], name
    assert (array.shards[0] if array.shards else None) == sizes[shard], name
    if array.shards:
        (codec,) = metadata["codecs"]
        assert codec["name"] == "sharding_indexed"
        assert codec["configuration"]["index_location"] == "end"
        assert [index["name"] for index in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


def test_compression_is_as_documented() -> None:
    rows = table("Compression")
    assert [row[0] for row in rows] == ["none", "lz4", "blosc-zstd", "zstd", "gzip"]
    assert {row[0] for row in rows} == set(get_args(Compression))
    for compression, name, configuration in rows:
        spec = ArraySpec("x", "float16", 4, 64, 32, cast("Compression", compression))
        (sharding,) = json.loads(array_metadata(spec, 64, {}))["codecs"]
        codecs = sharding["configuration"]["codecs"]
        documented = configuration.replace("the item size", "2")
        wanted = {key: json.loads(value) for key, value in re.findall(r"(\w+) (\S+?)(?:,|$)", documented)}
        assert codecs[0] == {"name": "bytes", "configuration": {"endian": "little"}}
        assert codecs[1:] == ([] if name == "–" else [{"name": name, "configuration": wanted}])


def test_the_last_shard_is_laid_out_as_documented(caches: list[ActivationCache]) -> None:
    cache = caches[0]
    split, layout = cache.split("train"), cache.layout
    unit = split.n_units - 1
    data = (cache.path / "train" / "position" / "c" / str(unit)).read_bytes()
    n_chunks = -(-split.unit_rows[unit] // layout.chunk_rows)
    chunk_bytes, n_index = layout.chunk_rows * 2, layout.shard_rows // layout.chunk_rows
    absent = 2**64 - 1
    entries = [(i * chunk_bytes, chunk_bytes) if i < n_chunks else (absent, absent) for i in range(n_index)]
    rows, index = data[: n_chunks * chunk_bytes], data[n_chunks * chunk_bytes : -4]
    assert np.frombuffer(index, "<u8").reshape(-1, 2).tolist() == [list(entry) for entry in entries]
    stored = np.frombuffer(rows, "<u2")
    assert (stored[: split.unit_rows[unit]] > 0).all()
    assert not stored[split.unit_rows[unit] :].any()


def keys_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every leaf, list elements as ``[]``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner, f"{name}[]")
    else:
        yield name, value


def check_keys(rows: list[list[str]], values: list[Any]) -> None:
    """Check that values have the documented keys with the documented types, and no others."""
    documented = {}
    for key, kind, _ in rows:
        pattern = re.sub(r"<\w+>", ".+", re.escape(key))
        documented[re.compile(pattern + (r"(\..+)?" if kind == "object" else ""))] = (key, kind)
    found = set()
    for value in values:
        for key, leaf in keys_of(value):
            matching = [entry for pattern, entry in documented.items() if pattern.fullmatch(key)]
            assert len(matching) == 1, (key, matching)
            found.add(matching[0][0])
            if matching[0][1] != "object":
                assert isinstance(leaf, JSON_TYPES[matching[0][1]]), (key, leaf)
                assert not isinstance(leaf, bool), key
    assert found == {key for key, _, _ in rows}


def read(path: Path) -> Any:
    data = path.read_bytes()
    value = json.loads(data)
    assert data == canonical_json(value), path
    return value


def test_the_manifest_is_as_documented(caches: list[ActivationCache]) -> None:
    paths = [path for cache in caches for path in cache.path.glob("manifest*.json")]
    check_keys(table("Manifest"), [read(path) for path in paths])
    assert {read(path)["change"] for path in paths} == {"create", "extend", "widen"}


def test_commit_records_are_as_documented(caches: list[ActivationCache]) -> None:
    for which, kind in enumerate(("unit", "contexts")):
        paths = [path for cache in caches for path in cache.path.glob(f"commits/*/*-{kind}-*.json")]
        check_keys(table("Commit records", which), [read(path) for path in paths])


def test_vocabulary_is_as_documented(caches: list[ActivationCache]) -> None:
    check_keys(table("Vocabulary"), [read(cache.path / "vocabulary.json") for cache in caches])


def test_statistics_are_as_documented(caches: list[ActivationCache]) -> None:
    paths = [path for cache in caches for path in cache.path.glob("statistics/*/*/*/*/*/zarr.json")]
    metadata = [json.loads(path.read_bytes()) for path in paths]
    check_keys(table("Statistics"), [each["attributes"] for each in metadata])
    assert {each["data_type"] for each in metadata} == {"float64"}


def test_materialised_epochs_are_as_documented(caches: list[ActivationCache]) -> None:
    epochs = list((caches[0].path / "epochs").iterdir())
    check_keys(table("Order"), [read(epoch / "manifest.json") for epoch in epochs])
    check_keys(table("Order", 1), [read(record) for epoch in epochs for record in epoch.glob("commits/*.json")])


def test_checksums_are_as_documented(caches: list[ActivationCache]) -> None:
    manifest = caches[0].manifest
    data = (caches[0].path / "vocabulary.json").read_bytes()
    assert manifest.files["vocabulary.json"].checksum == f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"


def words(name: str, n: int) -> list[int]:
    """Return the first n words of Philox4x64-10 as docs/format.md defines them, in plain integers."""
    mask = 2**64 - 1
    key = xxhash.xxh3_128(name.encode()).intdigest()
    found: list[int] = []
    block = 0
    while len(found) < n:
        block += 1
        k0, k1 = key & mask, key >> 64
        c0, c1, c2, c3 = block, 0, 0, 0
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        found += [c0, c1, c2, c3]
    return found[:n]


def permutation(name: str, n: int) -> list[int]:
    drawn = words(name, n)
    return sorted(range(n), key=drawn.__getitem__)


def test_the_order_follows_from_the_document_and_zarr_alone(caches: list[ActivationCache]) -> None:
    manifest = json.loads((caches[1].path / "manifest.json").read_bytes())
    n_rows, bucket_rows = manifest["splits"]["train"]["n_rows"], manifest["splits"]["train"]["bucket_rows"]
    shard_rows, seed, split_seed, epoch = manifest["format"]["shard_rows"], manifest["seed"], 3, 1
    units = [min(shard_rows, n_rows - start) for start in range(0, n_rows, shard_rows)]
    free = np.array([min(bucket_rows, n_rows - start) for start in range(0, n_rows, bucket_rows)])
    assert len(units) > 2
    assert len(free) > 2
    # units: stored position → token order
    rows_of = [
        [unit * shard_rows + row for row in permutation(f"{seed}/train/unit/{unit}", n)] for unit, n in enumerate(units)
    ]
    deal = np.random.Generator(
        np.random.Philox(key=xxhash.xxh3_128(f"{split_seed}/train/deal/{epoch}".encode()).intdigest())
    )
    buckets: list[list[int]] = [[] for _ in free]
    for stored in rows_of:
        counts = deal.multivariate_hypergeometric(free, len(stored), method="marginals")
        free = free - counts
        ends = np.cumsum(counts)
        for bucket, (start, stop) in enumerate(zip(ends - counts, ends, strict=True)):
            buckets[bucket] += stored[start:stop]
    served = [
        rows[i]
        for bucket, rows in enumerate(buckets)
        for i in permutation(f"{split_seed}/train/bucket/{epoch}/{bucket}", len(rows))
    ]
    group = zarr.open_group(caches[1].path / "train", mode="r")
    context, position = (np.asarray(cast("zarr.Array", group[name])[...]) for name in ("context", "position"))
    in_token_order = np.lexsort((position, context))
    stored_order = np.concatenate([np.array(rows) for rows in rows_of])
    assert np.array_equal(in_token_order[stored_order], np.arange(n_rows))
    with (
        caches[1]
        .split("train")
        .stream(
            ["context", "position"], batch_rows=40, seed=split_seed, epoch=epoch, n_epochs=2, order="gathered"
        ) as stream
    ):
        batches = [(batch.arrays["context"].copy(), batch.arrays["position"].copy()) for batch in stream]
    assert np.array_equal(np.concatenate([batch[0] for batch in batches]), context[in_token_order[served]])
    assert np.array_equal(np.concatenate([batch[1] for batch in batches]), position[in_token_order[served]])


def test_int8_decodes_by_the_documented_formula(caches: list[ActivationCache]) -> None:
    cache = caches[0]
    group = zarr.open_group(cache.path / "train" / "sites" / "layer0" / "in", mode="r")
    assert group.attrs["value"] == "q * scale * column_scale"
    q, scale, column_scale = (
        np.asarray(cast("zarr.Array", group[name])[...]) for name in ("q", "scale", "column_scale")
    )
    assert np.abs(q.astype(int)).max() == 127
    decoded = q * scale[:, None] * column_scale
    rows = cache.split("train").read_unit(0, ["layer0/in"])["layer0/in"]
    assert np.array_equal(np.sort(decoded[: len(rows)], axis=0), np.sort(rows, axis=0))
