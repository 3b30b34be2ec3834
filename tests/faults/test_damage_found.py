"""Damage to any file of any artifact: `pipeline verify` finds it, in an artifact alone, inside another or in a folder.

Not damage to the artifact: a bit of a file that no manifest lists (labels, times, baselines, logs of the cache), and a
change of a manifest that a valid digest vouches for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.cache import verify
from tailrace.storage.artifact import MANIFEST
from tailrace.storage.errors import ActionableError
from tests.faults.damage import DAMAGES, RELEASE, Damage, files_below, flip
from tests.released.values import artifacts
from tests.support.cache_jobs import command

KINDS = {name: kind for name, kind in artifacts(RELEASE).items() if not name.startswith("drafts/")}
"""The kind of each published artifact of the last release."""
OUTERMOST = [name for name in KINDS if not any(name.startswith(f"{other}/") for other in KINDS)]


def is_found(path: Path) -> bool:
    """Return whether verification says that something is wrong."""
    try:
        return not verify.run(path, pairs=0).passed
    except ActionableError:
        return True


def listed_files(artifact: Path) -> list[Path]:
    """Return the files of an artifact, and of those inside it, that something vouches for.

    A user fills in the ratings. Held-out shards under ``superseded`` are second names of what lies in the cache.
    """
    return [
        file
        for file in files_below(artifact)
        if file.name != "ratings.csv" and not {"superseded", "heldout"} <= {*file.parts}
    ]


def missed_damages(
    artifact: Path, damages: Sequence[Damage], random: np.random.Generator, each: int = 1
) -> tuple[int, list[str]]:
    """Damage each file of an artifact in ``each`` ways; return how often, and which damages verification missed."""
    n, missed = 0, []
    for file in listed_files(artifact):
        kept = file.read_bytes()
        for damage in [damages[index] for index in random.choice(len(damages), each, replace=False)]:
            damage(file, random)
            if not file.exists() or file.read_bytes() != kept:
                n += 1
                missed += [] if is_found(artifact) else [f"{damage.__name__} {file}"]
            file.write_bytes(kept)
    return n, missed


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RELEASE / "sweep", tmp_path / "folder" / "sweep"))


def test_damage_inside_a_sweep_is_found(sweep: Path) -> None:
    n, missed = missed_damages(sweep, (flip,), np.random.Generator(np.random.Philox(0)))
    assert missed == []
    assert n >= 8


def test_a_folder_is_verified_to_its_end(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep.parent
    shutil.copytree(RELEASE / "transcoders/relu", folder / "relu")
    shutil.copytree(RELEASE / "transcoders/topk", folder / "topk")
    shutil.copytree(RELEASE / "drafts/transcoder", folder / "draft")
    assert command(capsys, "verify", folder).code == 0
    (folder / "relu/weights.safetensors").unlink()
    (sweep / MANIFEST).write_text("{")
    answer = command(capsys, "verify", folder)
    assert answer.code == 1
    assert [line[:4] for line in answer.out.splitlines()] == ["FAIL", "FAIL", "ok  ", "--  ", "3 ar"]
    assert "3 artifacts checked, 2 damaged, 1 never finished" in answer.out
    assert "relu/weights.safetensors: is missing" in answer.err
    assert "sweep/manifest.json: is not valid JSON" in answer.err


def test_a_folder_in_which_nothing_was_finished_is_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RELEASE / "drafts/transcoder", tmp_path / "draft")
    answer = command(capsys, "verify", tmp_path)
    assert (answer.code, "verified" in answer.out) == (1, False)
    assert f"problem: nothing was checked: no artifact in {tmp_path} was finished" in answer.err


def test_a_small_sample_reads_a_file_and_says_how_many(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "verify", sweep.parent, "--sample", "0.001%")
    assert (answer.code, "read 1 of " in answer.out) == (0, True)
    assert command(capsys, "verify", sweep, "--quiet").out == ""


def test_seeds_in_a_row_read_every_file(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(sweep / "runs/k=2/weights.safetensors", np.random.Generator(np.random.Philox(0)))
    checks = [verify.run(sweep, sample=0.25, seed=seed) for seed in range(4)]
    assert sum(not check.passed for check in checks) == 1
    assert all("4 seeds in a row" in check.sampled for check in checks)
    answer = command(capsys, "verify", sweep, "--sample", "0%")
    assert answer.code == 2
    assert "'0%' is no share" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTERMOST)
def test_every_damage_is_found(tmp_path: Path, record_property: Callable[[str, object], None], name: str) -> None:
    artifact = Path(shutil.copytree(RELEASE / name, tmp_path / "artifact"))
    random = np.random.Generator(np.random.Philox(5))
    n, missed = missed_damages(artifact, DAMAGES, random, each=2)
    record_property("damages", n)
    assert missed == []
    assert n >= len(json.loads((artifact / MANIFEST).read_bytes())["files"])
