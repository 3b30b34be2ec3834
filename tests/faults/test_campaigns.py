"""Whatever crash, refusal, power cut or signal: the same command again ends with the same bytes and nothing else."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.faults.campaigns import CAMPAIGNS, Bench, NotReached, second_opinion
from tests.faults.lab import Call, Fault, Lab, Mode, Signal, needs_compiler
from tests.faults.power_cut import Disk
from tests.faults.stages import STAGES, copy_release

NO_LAB = needs_compiler()
needs_lab = pytest.mark.skipif(NO_LAB is not None, reason=NO_LAB or "")
QUICK = ("train", "import")
MOST = 10
"""Cases of each campaign and stage in the slow test."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.open() as lab:
        copy_release(lab.folder)
        yield lab


def sample(bench: Bench, campaign: str, n_cases: int) -> list[str]:
    rng = random.Random(0)
    cases = list(CAMPAIGNS[campaign].cases(bench, rng))
    return rng.sample(cases, min(n_cases, len(cases)))


def problems(bench: Bench, n_cases: int) -> dict[str, list[str]]:
    judged = {}
    cases = {name: sample(bench, name, n_cases) for name in CAMPAIGNS}
    for name, campaign in CAMPAIGNS.items():
        for case in cases[name]:
            with suppress(NotReached):
                judged[f"{name}/{case}"] = campaign.judge(bench, case)
    n_campaigns = sum(map(bool, cases.values()))  # of a command that only prints, nothing crashes or loses power
    assert len(judged) > n_campaigns // 2  # of a refusal to read, the file may not be read at all
    return {case: problems for case, problems in judged.items() if problems}


@needs_lab
@pytest.mark.parametrize("stage", QUICK)
def test_some_cases_of_every_campaign_end_as_if_nothing_had_been(lab: Lab, stage: str) -> None:
    bench = Bench(lab, stage)
    assert problems(bench, 1) == {}
    second_opinion(bench.made)


@needs_lab
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_campaign_of_every_stage_ends_as_if_nothing_had_been(lab: Lab, stage: str) -> None:
    bench = Bench(lab, stage)
    assert problems(bench, MOST) == {}
    second_opinion(bench.made)


@needs_lab
@pytest.mark.parametrize(
    ("stage", "campaign", "case"),
    [
        # a disk that refuses a file given in a folder was reported as a wrong setting, with exit code 2
        ("import", "refused-read", "EIO-open-exports/circuit-tracer/config.yaml"),
        # the site was made without what the transcoder's manifest says, and exit code 0
        ("dashboard", "refused-read", "EIO-open-transcoders/topk/manifest.json"),
        # what a folder that the system does not list takes on the disk was left out, and exit code 0
        ("info", "refused-read", "EACCES-list-caches/grown/train/context/c"),
        # an artifact whose names may not be looked at was not listed, and exit code 0
        ("ls", "refused-read", "EACCES-stat-imports/layer/.lock"),
    ],
)
def test_what_failed_once_is_mended(lab: Lab, stage: str, campaign: str, case: str) -> None:
    assert CAMPAIGNS[campaign].judge(Bench(lab, stage), case) == []


@needs_lab
def test_the_laboratory_does_what_it_says(lab: Lab) -> None:
    bench = Bench(lab, "label-export")
    (write,) = [number for number, call in enumerate(bench.changes, 1) if call.name == "write"]
    bench.reset()
    torn = bench.run(Fault(Mode.TEAR, write))
    assert (torn.code, torn.hit.split()[0]) == (-signal.SIGKILL, "write")
    (left,) = [path for path in bench.output.iterdir() if ".tmp-" in path.name]
    assert left.stat().st_size == bench.changes[write - 1].size // 2
    assert "made" not in (bench.difference(torn) or "")
    assert "missing: output/labels.csv; left: output/.labels.csv.tmp-" in (bench.difference(torn) or "")
    full = bench.run(Fault(Mode.REFUSE_ONE, write, 28))
    assert full.code == 1
    assert "No space left on device" in full.said
    assert full.problem(0) is not None
    stopped = bench.run(signals=[Signal(0.0, signal.SIGTERM)])
    assert stopped.code == -signal.SIGTERM
    assert bench.finish() == []


def calls(*lines: tuple[str, str, str, int, int, int, bytes]) -> list[Call]:
    return [Call(*line) for line in lines]


def test_a_power_cut_loses_what_was_not_synced(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")
    disk, new = Disk(tmp_path), f"{tmp_path}/new"
    done = calls(
        ("create", new, "", 0, 0, 7, b""),
        ("write", new, "", 0, 3, 7, b"abc"),
        ("fsync", new, "", 0, 0, 7, b""),
        ("write", new, "", 3, 3, 7, b"def"),
        ("rename", new, f"{tmp_path}/kept", 0, 0, 0, b""),
    )
    found = []
    for call in done:
        disk.replay(call)
    for state in disk.states(seed=0):
        for path in tmp_path.iterdir():
            path.unlink()
        tmp_path.rmdir()
        state.build()
        found.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert found[:4] == [{"kept": b"abc"}, {"kept": b"abc\0\0\0"}, {"kept": b"old"}, {"kept": b"old"}]
    disk.replay(Call("fsync", str(tmp_path), "", 0, 0, 0, b""))
    (sure,) = [state for state in disk.states(seed=0) if state.label == "names-lost-bytes-kept"]
    assert sorted(map(os.path.basename, sure.names)) == sorted([tmp_path.name, "kept"])


def test_what_lies_in_a_folder_that_is_renamed_comes_along(tmp_path: Path) -> None:
    disk, draft, final = Disk(tmp_path), f"{tmp_path}/draft", f"{tmp_path}/final"
    for call in calls(
        ("mkdir", draft, "", 0, 0, 0, b""),
        ("create", f"{draft}/file", "", 0, 0, 7, b""),
        ("fsync", draft, "", 0, 0, 0, b""),
        ("fsync", str(tmp_path), "", 0, 0, 0, b""),
        ("rename", draft, final, 0, 0, 0, b""),
    ):
        disk.replay(call)
    kept, _, lost, *_ = disk.states(seed=0)
    assert sorted(kept.names) == [str(tmp_path), final, f"{final}/file"]
    assert sorted(lost.names) == [str(tmp_path), draft, f"{draft}/file"]
    disk.replay(Call("fsync", str(tmp_path), "", 0, 0, 0, b""))
    assert sorted(next(s for s in disk.states(seed=0) if s.label == lost.label).names) == sorted(kept.names)


def test_other_systems_judge_what_is_published_and_nothing_else(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "tables").mkdir(parents=True)
    table = pa.table({"feature": np.arange(3), "name": ["a", None, "c"]})
    pyarrow.parquet.write_table(table, made / "tables" / "features.parquet")
    assert second_opinion(made) == (0, 0)
    (made / "tables" / "manifest.json").write_text("{}")
    assert second_opinion(made) == (0, 1)
