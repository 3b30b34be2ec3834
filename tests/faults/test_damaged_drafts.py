"""Damage to what a killed command left: the same command makes the right bytes of it, or refuses and says why.

Nothing damaged is continued from and published as good. Left to `pipeline verify`, which finds it, is damage to rows of
finished shards beyond those that are read again, of which these drafts are too small to have any, and to what earlier
generations published, ``superseded`` among it. A changed ``request.json`` is another request, and refused as such.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tailrace.storage.artifact import MANIFEST
from tailrace.storage.cache_format import BEGUN, PROVENANCE, CacheFormat, Site, UnitRecord, split_path, unit_record_name
from tailrace.storage.cache_writer import RECHECKED_BYTES, UnitBuffer, recall_record, write_sealed
from tests.faults.campaigns import second_opinion
from tests.faults.damage import (
    DAMAGES,
    Damage,
    contents,
    cut,
    files_below,
    flip,
    interruption,
    is_refusal,
    pipeline,
    released,
    zero,
)
from tests.released.recipe import STEPS
from tests.support.cache_jobs import differing

_LINES = {step.output: step.line for step in STEPS}
_RUN = "--d-sae 16 --batch-rows 32 --steps 12 --lr 0.01 --log-every 4 --evaluate-every 4 --precision float32"
_CACHE = (
    "cache --model model --dataset text.jsonl --context-length 16 --contexts-per-batch 4 --holdout 1 --layers 0 "
    "--shard-rows 64 --chunk-rows 16 --storage-dtype float32 --out {out}"
)


class Draft(NamedTuple):
    """A command line that is interrupted after the n-th rename to a name, and those that come before it."""

    line: str
    name: str
    nth: int = 1
    before: str = ""
    inputs: tuple[str, ...] = ("caches/float32",)
    folder: str = ""
    """Below which files are damaged."""


TRAIN = Draft(
    f"train caches/float32 --site layer1 --k 4 {_RUN} --snapshots 1 --keep-best --checkpoint-steps 4 --out {{out}}",
    "000000008.safetensors",
)
CACHE = Draft(f"{_CACHE} --tokens 192", "commits/0/train-unit-000001", inputs=())
DASHBOARD = Draft(_LINES["dashboards/topk"], "data/index.js", inputs=("tables/topk",))
DRAFTS = {
    "train": TRAIN,
    "cache": CACHE,
    "cross-layer": Draft(_LINES["drafts/cross-layer"] + " --snapshots 1", "checkpoints/000000008.safetensors"),
    "sweep": Draft(_LINES["drafts/sweep"] + " --snapshots 1", "000000008.safetensors", 2),
    "sweep-ended": Draft(_LINES["drafts/sweep"], "runs.parquet"),
    # the cache beside is finished
    "layers": Draft(_LINES["layers"], "transcoders/layer0/manifest.json", inputs=(), folder="circuits/transcoders/"),
    "extend": Draft(
        "extend {out} --tokens 200",
        "commits/1/train-unit-000001",
        before=f"{_CACHE} --tokens 80",
        inputs=(),
    ),
    "widen": Draft(
        "widen {out} --layers 1",
        "commits/1/train-unit-000001",
        before=f"{_CACHE} --tokens 150",
        inputs=(),
    ),
    "shuffle": Draft(
        "shuffle {out}",
        "commits/bucket-000001",
        before=f"{_CACHE} --tokens 192 --bucket-rows 64",
        inputs=(),
    ),
    "analyze": Draft(_LINES["tables/topk"], "features.parquet", inputs=("caches/float32", "transcoders/topk")),
    "dashboard": DASHBOARD,
    "live": Draft(_LINES["drafts/live"], "000000008.safetensors", inputs=()),
}


LEAST, MOST = 8, 12
"""Damages of each draft."""


class Outcomes(NamedTuple):
    """How the same command ended on damaged drafts."""

    n_remade: int
    n_refused: int
    wrong: list[str]
    """What was published with other bytes, or ended in a traceback."""


def try_damages(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    draft: Draft,
    damages: Sequence[Damage],
    only: Sequence[str] = ("",),
    most: int | None = None,
) -> Outcomes:
    """Damage files of a draft that is made in ``folder``, one at a time, and run the same command each time.

    Those whose names hold one of ``only``, each in all ways, or as many cases as ``most``.
    """
    released(folder, *draft.inputs)
    random = np.random.Generator(np.random.Philox(7))
    output, kept = folder / "output", folder / "kept"
    line = draft.line.format(out="output")
    if draft.before:
        assert pipeline(capsys, folder, draft.before.format(out="output")).code == 0
    finished = contents(output)  # which `pipeline verify` looks after
    with interruption(draft.name, draft.nth):
        pipeline(capsys, folder, line)
    shutil.copytree(output, kept)
    assert pipeline(capsys, folder, line).code == 0
    expected, n_remade, n_refused, wrong = contents(output), 0, 0, []
    names = [name for name, data in contents(kept).items() if finished.get(name) != data]
    names = [name for name in names if name.startswith(draft.folder) and not name.startswith("superseded/")]
    names = [name for name in names if any(part in name for part in only)]
    cases = [(name, damage) for name in names for damage in damages]
    for name, damage in [cases[index] for index in random.permutation(len(cases))[:most]]:
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        damage(output / name, random)
        changed = contents(output)
        answer = pipeline(capsys, folder, line)
        differs = differing(contents(output), expected)
        if answer.code == 0 and not differs:
            second_opinion(output)
            n_remade += 1
        elif is_refusal(answer) and not _published_otherwise(contents(output), changed, expected):
            n_refused += 1
        else:
            wrong.append(f"{damage.__name__} {name}: exit code {answer.code}, {differs} differ: {answer.err[-300:]}")
    return Outcomes(n_remade, n_refused, wrong)


def _published_otherwise(found: dict[str, bytes], before: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Return whether a manifest was written that is not the right one."""
    return any(
        found[name] not in (before.get(name), expected.get(name))
        for name in found
        if name.rpartition("/")[2] == MANIFEST
    )


def test_a_damaged_checkpoint_snapshot_or_log_is_not_continued_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ("checkpoints/000000008", "snapshots/000000006.s", "metrics", "request")
    outcomes = try_damages(capsys, tmp_path, TRAIN, (flip,), names)
    assert outcomes == Outcomes(1, 3, [])  # the snapshot comes again after the checkpoint before it


def test_damaged_pages_of_a_dashboard_are_made_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcomes = try_damages(capsys, tmp_path, DASHBOARD, (flip,), ("data/",))
    assert outcomes == Outcomes(5, 0, [])  # the list, two files of data and their seals


def test_a_unit_of_which_any_file_changed_counts_as_not_written(tmp_path: Path) -> None:
    layout = CacheFormat((Site("layer0", "in", "out", 4, 4, "float32"),), 8, 32, 8, "none", 8)
    index, buffer = np.arange(32), UnitBuffer(layout)
    buffer.begin(0, "train", 0, 32)
    where = {"context": index // 8, "position": index % 8}
    provenance = {name: where.get(name, index).astype(kind) for name, kind in PROVENANCE.items()}
    buffer.fill(provenance, {key: np.ones((32, 4), np.float32) for key in layout.encodings()})
    buffer.commit(tmp_path, 0)
    write_sealed(tmp_path, BEGUN, b"{}")  # by its seal a draft is known to have seals
    name, random = unit_record_name(0, "train", 0), np.random.Generator(np.random.Philox(3))

    def recalled(n_finished: int = 1, age: int = 0) -> bool:
        group = split_path(tmp_path, "train")
        return recall_record(tmp_path, name, UnitRecord, group, age=age, n_finished=n_finished) is not None

    assert recalled()
    for file in files_below(tmp_path):
        if file.name == Path(BEGUN).name:
            continue
        kept = file.read_bytes()
        for damage in DAMAGES:
            damage(file, random)
            assert not recalled() or file.read_bytes() == kept, (damage.__name__, file)
            file.write_bytes(kept)
    flip(tmp_path / "train/sites/layer0/out/c/0/0", random)
    many = RECHECKED_BYTES // 100
    assert not recalled(many)  # the newest unit is read, of the others some
    assert recalled(many, age=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTS)
def test_no_damaged_draft_is_published(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    outcomes = try_damages(capsys, tmp_path, DRAFTS[name], (flip, cut, zero), most=MOST)
    record_property("made again", outcomes.n_remade)
    record_property("refused", outcomes.n_refused)
    assert outcomes.wrong == []
    assert outcomes.n_remade + outcomes.n_refused >= LEAST
