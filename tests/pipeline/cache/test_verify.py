"""``pipeline verify`` passes what is right and names what is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.cache import stage, verify
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMismatch
from tests.faults.inputs import RELEASED
from tests.support.cache_jobs import HERE, command, copy_cache, model_folder, reseal, run_cache, small_blocks

WIDTH = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    run_cache(path, layers="all")
    return path


def shard_rows(shard: Path, n_rows: int) -> np.memmap:
    """Return the rows in an uncompressed float32 shard file, to be changed in place."""
    return np.memmap(shard, np.float32, "r+", shape=(n_rows, WIDTH))


def swap_sides(path: Path) -> None:
    for shard in sorted((path / "train/sites/layer0/in/c").glob("*/0")):
        other = path / "train/sites/layer0/out/c" / shard.parent.name / "0"
        kept = shard.read_bytes()
        shard.write_bytes(other.read_bytes())
        other.write_bytes(kept)


def shift_outputs_by_one_row(path: Path) -> None:
    split = open_cache(path).split("train")
    for unit, n_rows in enumerate(split.unit_rows):
        provenance = {
            name: np.fromfile(path / f"train/{name}/c/{unit}", dtype, n_rows)
            for name, dtype in (("context", "<u4"), ("position", "<u2"))
        }
        order = np.lexsort((provenance["position"], provenance["context"]))
        rows = shard_rows(path / f"train/sites/layer0/out/c/{unit}/0", n_rows)
        rows[order] = np.roll(rows[order], 1, axis=0)
        rows.flush()


def swap_two_contexts(path: Path) -> None:
    rows = shard_rows(path / "heldout/sites/layer1/in/c/0/0", open_cache(path).split("heldout").n_rows)
    rows[:30] = rows[:30][::-1].copy()
    rows.flush()


def test_a_good_cache_passes_every_check(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "verify", cache, "--threads", 1, "--shuffle", "--batch-rows", 25)
    assert answer.code == 0, answer
    assert "ok   checksums: every byte as written" in answer.out
    assert "ok   pairs: train layer0/in" in answer.out
    assert "relative error 0.0e+00" in answer.out  # same machine, same threads: the same bits
    assert "ok   pairs: heldout layer1/out" in answer.out
    assert "shuffle: 500 rows in batches of 25" in answer.out
    assert answer.out.endswith("verified\n")


def test_pairs_of_every_site_and_side_are_compared_with_the_model(cache: Path) -> None:
    reports = verify.check_pairs(cache, n_contexts=5, compute=Compute(threads=1))
    places = [(report.split, report.site, report.side) for report in reports]
    assert sorted(places) == sorted(
        (split, site, side) for split in ("train", "heldout") for site in ("layer0", "layer1") for side in ("in", "out")
    )
    for report in reports:
        # 33 training and 4 held-out contexts have rows; the last of them may have less than 15
        assert report.n_rows in range(4 * 15 + 1, 5 * 15 + 1) if report.split == "train" else report.n_rows == 60
        assert report.relative_error == 0
        assert report.passed
        assert (report.mlp_relative_error is None) == (report.side == "in")
    assert max(report.mlp_relative_error or 0 for report in reports) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "train/sites/layer0/in/c/2/0",
        "heldout/sites/layer1/out/c/0/0",
        "train/token_id/c/0",
        "train/contexts/tokens/c/1/0",
        "train/sites/layer0/in/zarr.json",
        "commits/0/train-unit-000003.json",
        "statistics/0/train/layer0/in/mean/c/0",
        "packing/0.json",
        "vocabulary.json",
        "manifest-0.json",
        "request.json",
    ],
)
def test_one_changed_byte_fails_and_names_the_file(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = copy_cache(cache, tmp_path / "cache")
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    answer = command(capsys, "verify", path)
    assert answer.code == 1
    assert "FAIL checksums: 1 problem\n" in answer.out
    assert f"problem: {path / name}: " in answer.err
    assert "verified" not in answer.out


def test_a_damaged_manifest_fails_and_is_named(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy_cache(cache, tmp_path / "cache")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    answer = command(capsys, "verify", path)
    assert answer.code == 1
    assert f"{manifest}: differs from its own digest" in answer.err


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (swap_sides, ["train layer0/in", "train layer0/out"]),
        (shift_outputs_by_one_row, ["train layer0/out"]),
        (swap_two_contexts, ["heldout layer1/in"]),
    ],
)
def test_rows_that_do_not_belong_together_are_found_though_every_checksum_is_right(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, found: list[str]
) -> None:
    path = copy_cache(cache, tmp_path / "cache")
    damage(path)
    reseal(path)
    assert verify_bytes(path) == []
    answer = command(capsys, "verify", path, "--threads", 1)
    assert answer.code == 1
    failed = [line.removeprefix("FAIL pairs: ").split(",")[0] for line in answer.out.splitlines() if "FAIL" in line]
    assert failed == found


def test_another_model_is_refused_with_both_values(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = model_folder(seed=5)
    with pytest.raises(ArtifactMismatch, match=r"files_digest \(content of .*: there it is 'sha256:\w{12}…', asked"):
        verify.check_pairs(cache, model=str(other))
    answer = command(capsys, "verify", cache, "--model", other)
    assert answer.code == 1
    assert "error: " in answer.err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounding_by_storage_is_no_failure(tmp_path: Path, dtype: str) -> None:
    run_cache(tmp_path / "cache", storage_dtype=dtype)
    for report in verify.check_pairs(tmp_path / "cache", compute=Compute(threads=1)):
        assert 0 < report.relative_error <= report.tolerance


def test_a_grown_cache_passes_with_all_its_generations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cache"
    run_cache(path)
    with small_blocks():
        stage.extend(path, 700, **HERE)
        stage.widen(path, "1", (), **HERE)
    assert command(capsys, "verify", path, "--threads", 1).code == 0
    superseded = next((path / "superseded/0").rglob("c/7/0"))
    data = bytearray(superseded.read_bytes())
    data[0] ^= 1
    superseded.write_bytes(data)
    answer = command(capsys, "verify", path)
    assert (answer.code, f"problem: {superseded}: checksum is" in answer.err) == (1, True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no cache, transcoder, tables or other artifact lies here"),
        ({"request.json": "{}"}, "this artifact was never finished"),
    ],
)
def test_what_was_never_published_cannot_be_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    answer = command(capsys, "verify", tmp_path)
    assert answer.code == 1
    assert f"error: {tmp_path}: {message}" in answer.err


@pytest.mark.parametrize("folder", ["sweep", "."])
def test_a_damaged_manifest_of_a_sweep_hides_no_damaged_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    sweep = tmp_path / "folder/sweep"
    shutil.copytree(RELEASED / "sweep", sweep)
    weights = next(sweep.glob("runs/*/*.safetensors"))
    for file in (sweep / "manifest.json", weights):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    answer = command(capsys, "verify", str(tmp_path / "folder" / folder))
    assert answer.code == 1
    assert f"{sweep}/manifest.json: " in answer.err
    assert f"{weights}: checksum is" in answer.err
