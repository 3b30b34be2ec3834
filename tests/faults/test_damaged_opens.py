"""Damage to finished artifacts: what reads them gives the same answer or an error, and never another answer.

Not seen without `pipeline verify`: damage to large files that are not read in one piece and not drawn for comparison.
These are shards of which a batch or a unit is read, when all that are read have more than 16 MiB together and another
is drawn in that epoch or pass; and of tables of more than 16 MiB the footer, or for `query` all of tables of more than
1 GiB. The artifacts here are small, so that everything is compared.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.dashboard.serve import open_site
from tailrace.storage.errors import ArtifactCorrupt
from tests.faults.campaigns import second_opinion
from tests.faults.damage import DAMAGES, Damage, contents, files_below, flip, is_refusal, pipeline, released
from tests.support.cache_jobs import Answer, differing

_RUN = "--d-sae 16 --batch-rows 32 --steps 4 --lr 0.01 --log-every 2 --evaluate-every 2 --precision float32"
_CIRCUIT = "circuit 'the people of the government' --logit of --iterations 2 --branches 3 --max-features 4"


class Reader(NamedTuple):
    """A command line, what it reads, and which of these are damaged."""

    line: str
    damaged: tuple[str, ...]
    beside: tuple[str, ...] = ()


READERS = {
    "train": Reader(f"train caches/float32 --site layer1 --k 4 {_RUN} --out out", ("caches/float32",)),
    "analyze": Reader(
        "analyze transcoders/topk --cache caches/float32 --examples 2 --bands 2 --band-examples 1 --random-examples 1 "
        "--window-before 4 --window-after 4 --out out",
        ("transcoders/topk", "caches/float32"),
    ),
    "evaluate": Reader(
        "evaluate transcoders/layer0 transcoders/topk --cache caches/float32 --out out",
        ("transcoders/topk", "caches/float32"),
        ("transcoders/layer0",),
    ),
    "circuit": Reader(
        f"{_CIRCUIT} --transcoders transcoders/layer0 --transcoders transcoders/topk --tables tables/topk --out out",
        ("transcoders/topk", "tables/topk"),
        ("transcoders/layer0",),
    ),
    "export": Reader("export transcoders/jumprelu --to saelens --fold-norm --out out", ("transcoders/jumprelu",)),
    "export-delphi": Reader(
        "export tables/topk --to delphi --cache caches/float32 --out out", ("tables/topk", "caches/float32")
    ),
    "query": Reader("query 'SELECT * FROM features' --tables tables/topk", ("tables/topk",)),
    "query-many": Reader(
        "query 'SELECT * FROM activations JOIN rows USING (row) JOIN features USING (feature) ORDER BY ALL' "
        "--tables tables/topk --out answer.csv",
        ("tables/topk",),
    ),
    "dashboard": Reader("dashboard tables/topk --feature 0-5 --window 4 --out out", ("tables/topk",)),
    "pareto": Reader("pareto sweep --out out.html", ("sweep",)),
}


MOST = 25
"""Files that are damaged in each way, for each command."""


class Outcomes(NamedTuple):
    """How a command ended on damaged artifacts."""

    n_same: int
    n_refused: int
    wrong: list[str]
    """Where it gave another answer or a traceback."""


def ask(capsys: pytest.CaptureFixture[str], folder: Path, line: str) -> tuple[Answer, dict[str, bytes]]:
    """Run a command; return what it said and wrote, which is deleted."""
    answer = pipeline(capsys, folder, line)
    written: dict[str, bytes] = {"": answer.out.encode()} if "--out" not in line else {}
    for path in (folder / "out", folder / "out.html", folder / "answer.csv"):
        if path.is_dir():
            second_opinion(path)
            written |= contents(path)
            shutil.rmtree(path)
        elif path.exists():
            written[path.name] = path.read_bytes()
            path.unlink()
    return answer, written


def try_damages(
    capsys: pytest.CaptureFixture[str], folder: Path, reader: Reader, damages: Sequence[Damage], most: int
) -> Outcomes:
    """Damage files that a command may read, at most ``most``, and run it each time."""
    released(folder, *reader.damaged, *reader.beside)
    answer, expected = ask(capsys, folder, reader.line)
    assert answer.code == 0, answer.err
    random = np.random.Generator(np.random.Philox(DAMAGES.index(damages[0])))
    n_same, n_refused, wrong = 0, 0, []
    files = [file for name in reader.damaged for file in files_below(folder / name)]
    for file in [files[index] for index in random.permutation(len(files))[:most]]:
        for damage in damages:
            kept = folder / "kept"
            shutil.copy2(file, kept)
            damage(file, random)
            answer, written = ask(capsys, folder, reader.line)
            differs = differing(written, expected)
            n_same += answer.code == 0 and not differs
            n_refused += is_refusal(answer)
            if not is_refusal(answer) and (answer.code or differs):
                name = file.relative_to(folder)
                wrong.append(
                    f"{damage.__name__} {name}: exit code {answer.code}, {differs} differ: {answer.err[-300:]}"
                )
            shutil.copy2(kept, file)
    return Outcomes(n_same, n_refused, wrong)


def test_damaged_tables_are_not_answered_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcomes = try_damages(capsys, tmp_path, READERS["query"], (flip,), most=6)
    assert outcomes.wrong == []
    assert outcomes.n_refused


def test_damaged_rows_are_not_trained_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    released(tmp_path, "caches/float32")
    shard = tmp_path / "caches/float32/train/sites/layer1/out/c/1/0"
    flip(shard, np.random.Generator(np.random.Philox(0)))
    answer = pipeline(capsys, tmp_path, READERS["train"].line)
    assert is_refusal(answer)
    assert f"{shard.relative_to(tmp_path)}: checksum is" in answer.err
    assert "pipeline verify" in answer.err


def test_no_damaged_file_of_a_dashboard_is_served(tmp_path: Path) -> None:
    site = released(tmp_path, "dashboards/topk") / "dashboards/topk"
    expected, random = contents(site), np.random.Generator(np.random.Philox(5))
    server = open_site([site])
    for name in sorted(DashboardManifest.read(site).files):
        assert server.read(name) == expected[name]
        for damage in DAMAGES:
            damage(site / name, random)
            if contents(site) != expected:
                with pytest.raises(ArtifactCorrupt, match=re.escape(f"{site / name}: ")):
                    server.read(name)
            (site / name).write_bytes(expected[name])
            assert server.read(name) == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", READERS)
def test_no_damaged_artifact_changes_an_answer(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
    damage: Damage,
) -> None:
    outcomes = try_damages(capsys, tmp_path, READERS[name], (damage,), MOST)
    record_property("same", outcomes.n_same)
    record_property("refused", outcomes.n_refused)
    assert outcomes.wrong == []
    assert outcomes.n_same + outcomes.n_refused
