"""``--generation`` of every command that reads a cache, the list that ``info`` has of them, and ``pipeline prune``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tailrace
from tailrace.pipeline.cli import cli
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST, canonical_json
from tailrace.storage.errors import ArtifactMissing, SettingsError
from tests.support.cache_jobs import command
from tests.support.quick import quick
from tests.support.synthetic_cache import extend_in_steps, memory_directory, widen_in_steps, write_synthetic_cache

TRAIN: dict[str, Any] = {"k": 2, "d_sae": 8, "steps": 2, "batch_rows": 32, "site": "layer0", "threads": 1}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TRAIN.items()]


@pytest.fixture(scope="module")
def grown() -> Iterator[Path]:
    """A folder with a cache of three generations and a transcoder of the second."""
    with memory_directory() as name:
        root = Path(name)
        write_synthetic_cache(root / "cache", n_contexts=70, n_heldout_contexts=2, shard_rows=256)
        for _ in extend_in_steps(root / "cache", n_contexts=80):
            pass
        for _ in widen_in_steps(root / "cache", widths=[("layer1", 4, 4)]):
            pass
        cli.main(
            ["train", str(root / "cache"), "--generation", "1", "--out", str(root / "made"), "--quiet", *FLAGS],
            standalone_mode=False,
        )
        yield root


@pytest.fixture
def copy(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cache_of(artifact: Path) -> dict[str, Any]:
    return dict(json.loads((artifact / MANIFEST).read_bytes())["inputs"]["cache"])


@pytest.mark.slow
def test_training_reads_the_generation_that_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_of(copy / "made") == open_cache(copy / "cache", 1).reference
    again = tailrace.train("cache", generation=1, out="made", **TRAIN)
    assert again.path == Path("made")
    swept = tailrace.sweep("cache", over={"k": [2]}, generation=0, out="swept", **{**TRAIN, "k": 1})
    assert cache_of(swept.path / "runs/k=2")["generation"] == 0
    answer = command(capsys, "train", "cache", "--generation", 0, "--out", "made", *FLAGS)
    assert (answer.code, "cache.generation: there it is 1, asked for 0" in answer.err) == (1, True)


@pytest.mark.slow
def test_shuffling_and_verifying_read_the_generation_that_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = json.loads(command(capsys, "shuffle", "cache", "--generation", 0, "--quiet", "--json").out)
    assert made["path"] == "cache/epochs/train-generation0-seed0-epoch0"
    check = ["verify", "cache", "--pairs", 0, "--shuffle", "--json", "--quiet"]
    rows = [json.loads(command(capsys, *check, "--generation", at).out)["shuffle"]["n_rows"] for at in (0, 2)]
    assert rows == [1050, 1200]
    assert tailrace.verify("cache", pairs=0, shuffle=True, generation=1).shuffle.n_rows == 1200  # type: ignore[union-attr]


READERS: dict[str, list[str]] = {
    "train": ["train", "cache", "--out", "new", *FLAGS],
    "dry run": ["train", "cache", "--out", "new", "--dry-run", *FLAGS],
    "sweep": ["train", "cache", "--out", "new", "--sweep", "lr=1e-3,2e-3", *FLAGS],
    "analyze": ["analyze", "made", "--cache", "cache", "--out", "new"],
    "evaluate": ["evaluate", "made", "--cache", "cache", "--out", "new"],
    "export": ["export", "made", "--to", "saelens", "--cache", "cache", "--out", "new"],
    "import": ["import", "made", "--from", "circuit-tracer", "--cache", "cache", "--out", "new"],
    "doctor": ["doctor", "cache", "--site", "layer0"],
    "shuffle": ["shuffle", "cache"],
    "info": ["info", "cache"],
    "verify": ["verify", "cache", "--no-checksums"],
}


@pytest.mark.parametrize("reader", quick(READERS, "train", "analyze", "shuffle"))
def test_every_reader_says_which_generations_there_are(
    copy: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    answer = command(capsys, *READERS[reader], "--generation", 9)
    assert answer.code == 1
    first, *lines = answer.err.partition("error: ")[2].splitlines()
    assert first == "cache: has no generation 9; read one of those that are kept:"
    assert [line.split(" rows")[0].split() for line in lines] == [
        ["generation", f"{number}:", rows, "train"] for number, rows in enumerate(("1,050", "1,200", "1,200"))
    ]
    assert not (copy / "new").exists()


def test_every_command_with_a_cache_to_read_is_tried_above() -> None:
    names = {name for name in cli.list_commands(None) if "--generation" in flags(name)}  # type: ignore[arg-type]
    assert names == {arguments[0] for arguments in READERS.values()}


def flags(name: str) -> set[str]:
    found = cli.get_command(None, name)  # type: ignore[arg-type]
    assert found is not None
    return {flag for parameter in found.params for flag in parameter.opts}


def test_a_generation_of_no_cache_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("info", "verify"):
        answer = command(capsys, name, "made", "--generation", 0)
        assert (answer.code, "made: is no cache, so it has no generation 0; leave" in answer.err) == (1, True)
    answer = command(capsys, "train", "--live", "--generation", 0, "--out", "new")
    assert (answer.code, "names a generation of a cache; give the cache" in answer.err) == (2, True)
    with pytest.raises(SettingsError, match=r"^generation: names a generation of a cache"):
        tailrace.train(live=True, generation=0, out="new")


def test_info_lists_generations_and_what_pruning_frees(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = tailrace.info("cache")
    listed = described["generations"]
    assert [(one["change"], one["rows"]["train"], one["sites"], one["newest"]) for one in listed] == [
        ("create", 1050, ["layer0"], False),
        ("extend", 1200, ["layer0"], False),
        ("widen", 1200, ["layer0", "layer1"], True),
    ]
    freed, last = [one["prune_frees"] for one in listed[:2]], listed[2]["prune_frees"]
    assert last is None
    assert all(n_bytes > 0 for n_bytes in freed)
    lines = [line for line in command(capsys, "info", "cache").out.splitlines() if line.startswith("generation ")]
    assert [line.split()[:5] for line in lines] == [
        ["generation", str(number), rows, "train", "rows,"] for number, rows in enumerate(("1,050", "1,200", "1,200"))
    ]
    assert (lines[0].split("; ")[1], lines[2].split("; ")[1]) == (
        f"pruning it frees {freed[0] / 1000:.3g} kB",
        "the newest",
    )
    assert tailrace.info("cache", generation=0)["train rows"] == 1050
    pruned = json.loads(command(capsys, "prune", "cache", "--json").out)
    assert (pruned["pruned"], pruned["bytes"]) == ([0, 1], sum(freed))


def test_older_generations_are_pruned_and_others_stay(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = json.loads(command(capsys, "prune", "cache", "--keep", 2, "--dry-run", "--json").out)
    assert dry == {"pruned": [0], "bytes": dry["bytes"], "made_from_them": [], "dry_run": True}
    assert open_cache("cache", 0).generation == 0
    text = command(capsys, "prune", "cache", "--dry-run").out.splitlines()
    assert [line.split(", since")[0] for line in text[:2]] == [
        "generation 0: 1,050 train rows, 30 heldout rows of layer0",
        "generation 1: 1,200 train rows, 30 heldout rows of layer0",
    ]
    assert text[2].startswith("cache: 2 generations and ")
    assert text[3:] == ["made: made from a generation that goes"]
    assert command(capsys, "prune", "cache", "--keep", 2).code == 0
    assert command(capsys, "prune", "cache", "--keep", 9).out == "cache: nothing to prune\n"
    with pytest.raises(ArtifactMissing, match="was pruned: generation 0"):
        open_cache("cache", 0)
    assert open_cache("cache", 1).split("train").n_rows == 1200
    done = json.loads(command(capsys, "prune", "cache", "--json").out)
    assert (done["pruned"], done["made_from_them"]) == ([1], ["made"])
    assert command(capsys, "prune", "cache", "--keep", 5).code == 0  # nothing is left to prune
    answer = command(capsys, "verify", "cache", "--pairs", 0)
    assert (answer.code, answer.out.splitlines()[-1]) == (0, "verified")
    assert command(capsys, "info", "cache").code == 0


def test_what_was_begun_with_a_generation_keeps_it_unless_forced(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "runs/begun").mkdir(parents=True)
    request = {"settings": {"steps": 3}, "inputs": {"cache": open_cache("cache", 1).reference}}
    (copy / "runs/begun/request.json").write_bytes(canonical_json(request))
    (copy / "runs/begun/metrics.jsonl").touch()
    answer = command(capsys, "prune", "cache")
    assert answer.code == 1
    assert "unfinished artifacts were begun with a generation that would go: runs/begun; finish or" in answer.err
    assert "keep it with --keep 2" in answer.err
    shown = command(capsys, "prune", "cache", "--dry-run")
    assert (shown.code, "runs/begun: unfinished, begun with a generation that goes" in shown.out) == (0, True)
    assert command(capsys, "prune", "cache", "--keep", 2).code == 0
    assert command(capsys, "prune", "cache", "--in", "made").code == 0  # where nothing unfinished lies
    answer = command(capsys, "train", "cache", "--out", "runs/begun", *FLAGS)
    assert (answer.code, "cache: was pruned: generation 1; read one of" in answer.err) == (1, True)


@pytest.mark.slow
def test_a_terminal_is_asked_first(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["n", "y"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: next(said))
    answer = command(capsys, "prune", "cache")
    assert (answer.code, "made: made from a generation that goes" in answer.err) == (130, True)
    assert open_cache("cache", 0).generation == 0
    assert command(capsys, "prune", "cache").code == 0
    assert next(said, None) is None
