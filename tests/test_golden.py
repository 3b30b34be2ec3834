"""What the recipe makes has the bytes it had: nothing but a commit that says so changes what any command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailrace.storage.artifact import MANIFEST
from tests.released.golden import differing, digests, machine, make_outputs, recorded
from tests.released.values import MANIFESTS, VALUES, comparable, read_all

QUICK = {"caches/float32", "caches/grown", "transcoders/topk", "transcoders/cross-layer", "sweep", "tables/topk"}
RELEASED = sorted(Path(__file__).parent.glob(f"released/*/{VALUES}"))[-1]


def check(folder: Path) -> None:
    """Compare order, provenance, names and schemas everywhere; bytes where this machine's are recorded."""
    expected = json.loads(RELEASED.read_text())["published"]
    for name, values in read_all(folder).items():
        found, released = comparable(name, values), comparable(name, expected[name])
        if name.startswith("dashboards/"):  # a newer site has more files
            assert set(released) <= set(found), name
        else:
            assert found == released, name
    for path in folder.rglob(MANIFEST):
        kind = json.loads(path.read_bytes())["kind"]
        MANIFESTS[kind].model_validate_json(path.read_bytes(), extra="forbid")  # says nothing that has no name there
    golden = recorded().get(machine())
    if golden is None:
        pytest.skip(
            "names, schemas, order and provenance are as recorded; bytes were not compared, since none are recorded "
            f"for {machine()}: compare two commits with `python -m tests.released.golden OTHER_CHECKOUT`"
        )
    assert differing(golden, digests(folder)) == []


def test_the_main_artifacts_keep_their_bytes(tmp_path: Path) -> None:
    make_outputs(tmp_path / "made", QUICK)
    check(tmp_path / "made")


@pytest.mark.slow
def test_every_artifact_keeps_its_bytes(tmp_path: Path) -> None:
    make_outputs(tmp_path / "made")
    check(tmp_path / "made")


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "runs.parquet").write_bytes(b"PAR1")
    before = digests(tmp_path)
    (tmp_path / "sweep" / "runs.parquet").write_bytes(b"PAR2")
    assert differing(before, digests(tmp_path)) == ["sweep"]
