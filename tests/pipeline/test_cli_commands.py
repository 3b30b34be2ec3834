"""The command line: every command from text to answers, exit codes, errors, interruption and completion."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import tailrace
from tailrace.pipeline import cli
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMissing
from tests.support.cache_jobs import (
    Answer,
    Job,
    Kill,
    command,
    differing,
    model_folder,
    run_cache,
    run_job,
    settings,
    small_blocks,
    text_file,
    tree,
)
from tests.support.forked import forked
from tests.support.paths import ROOT

CACHE_FLAGS = [
    "--layers", "0", "--context-length", 16, "--contexts-per-batch", 4, "--shard-rows", 64, "--chunk-rows", 16,
    "--storage-dtype", "float32", "--holdout", "0.1", "--threads", 1,
]  # fmt: skip


def cache_command(output: Path, *more: object) -> list[object]:
    where = ["--model", model_folder(), "--dataset", text_file(), "--out", output]
    return ["cache", *where, "--tokens", 500, *CACHE_FLAGS, *more]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a cache, a transcoder and tables, and what each of the three commands said."""
    place = tmp_path_factory.mktemp("place")
    train = ["--steps", 8, "--batch-rows", 50, "--d-sae", 32, "--architecture", "topk", "--k", 4, "--threads", 1]
    commands = {
        "cache": cache_command(place / "cache"),
        "train": ["train", place / "cache", "--out", place / "transcoder", *train],
        "analyze": [
            "analyze", place / "transcoder", "--cache", place / "cache", "--out", place / "tables", "--threads", 1
        ],
    }  # fmt: skip
    answers = {}
    for name, arguments in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, small_blocks():
            cli.main([str(argument) for argument in arguments])
        answers[name] = out.getvalue()
    return place, answers


def test_text_becomes_a_cache_a_transcoder_tables_and_answers(
    said: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    place, answers = said
    assert answers["cache"].startswith(f"{place / 'cache'}: 500 train rows, 60 heldout rows of layer0 (")
    assert answers["train"].startswith(f"{place / 'transcoder'}: 8 steps, held-out FVU ")
    assert answers["analyze"].startswith(f"{place / 'tables'}: 32 features over 60 rows, L0 4.0, FVU ")
    query = ["query", "SELECT count(*) AS n FROM features", "--tables", place / "tables"]
    assert json.loads(command(capsys, *query, "--format", "json").out) == [{"n": 32}]
    assert command(capsys, *query, "--out", place / "n.csv", "--format", "csv").out == f"{place / 'n.csv'}: written\n"
    assert (place / "n.csv").read_text().split() == ["n", "32"]
    for name in ("cache", "transcoder", "tables"):
        answer = command(capsys, "verify", place / name, "--threads", 1)
        assert (answer.code, answer.out.splitlines()[-1]) == (0, "verified"), answer.err
    made = json.loads(command(capsys, "analyze", place / "transcoder", "--cache", place / "cache", "--out",
        place / "tables", "--threads", 1, "--json").out)  # fmt: skip
    assert (made["path"], made["kind"], made["n_rows"]) == (str(place / "tables"), "tables", 60)
    checked = json.loads(command(capsys, "verify", place / "tables", "--json").out)
    assert (checked["passed"], checked["problems"]) == (True, [])


@pytest.mark.parametrize(
    ("name", "kind"), [("cache", "activation-cache"), ("transcoder", "transcoder"), ("tables", "tables")]
)
def test_info_shows_every_artifact_as_text_and_as_json(
    said: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    place, _ = said
    answer = command(capsys, "info", place / name)
    assert answer.code == 0
    assert [line.split() for line in answer.out.splitlines() if line.startswith("kind ")] == [["kind", kind]]
    assert json.loads(command(capsys, "info", place / name, "--json").out)["kind"] == kind


def test_info_of_a_transcoder_and_of_tables_fits_a_glance(
    said: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = said
    lines = {
        name: dict(
            re.split(r"\s{2,}", line, maxsplit=1) for line in command(capsys, "info", place / name).out.splitlines()
        )
        for name in ("transcoder", "tables")
    }
    whole = json.loads(command(capsys, "info", place / "transcoder", "--json").out)
    heldout = whole["metrics"]["heldout"]
    assert re.fullmatch(r"topk, k 4(, \w+( [\d.]+)?)*", lines["transcoder"].pop("architecture"))
    assert lines["transcoder"] == {
        "kind": "transcoder",
        "model": f"{model_folder().name} (float32)",
        "site layer0": "blocks.0.mlp.hook_in (16) -> blocks.0.mlp.hook_out (16)",
        "cache id": f"{whole['inputs']['cache']['cache_id']}, generation 0",
        "features": "32",
        "trained": "8 steps, 400 rows",
        "held out": f"FVU {heldout['fvu']:.4g}, L0 4.0, dead features {heldout['dead_fraction']:.1%}, over 60 rows",
        "everything else": "--json",
    }
    assert lines["tables"]["table features"] == "32 rows"
    assert lines["tables"]["rows read"] == "all heldout rows"
    assert lines["tables"]["transcoder"] == json.loads((place / "transcoder/manifest.json").read_text())["digest"]


def test_info_of_a_cache_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cache(tmp_path / "cache", holdout="0")
    described = json.loads(command(capsys, "info", tmp_path / "cache", "--json").out)
    assert described["model"] == f"{model_folder().name} (float32)"
    assert (described["train rows"], described["train contexts"]) == (500, 34)
    assert "blocks.0.mlp.hook_in (16) -> blocks.0.mlp.hook_out (16), float32" in described["site layer0"]
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert described["bytes on disk"] == n_bytes


@pytest.mark.slow
def test_info_of_an_unfinished_cache_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(Job.cache(tmp_path / "cache"), Kill(1, "train-unit-000002")) != 0
    answer = command(capsys, "info", tmp_path / "cache")
    assert answer.code == 0
    assert "unfinished: run the command that makes it again to continue" in answer.out
    assert ["finished", "units", "2"] in [line.split() for line in answer.out.splitlines()]
    answer = command(capsys, "info", tmp_path)
    assert (answer.code, answer.err) == (
        1,
        f"error: {tmp_path}: no cache, transcoder, tables or other artifact lies here; check the path\n",
    )


def test_a_dry_run_says_what_a_cache_would_cost_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, *cache_command(tmp_path / "new" / "cache", "--tokens", "60M", "--dry-run"))
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0] == "60,000,000 rows of layer0, shards of 64 rows"
    assert lines[1].split()[1:4] == ["rows/s", "measured:", "about"]
    assert lines[1].endswith((" s in one process", " min in one process", " h in one process"))
    # 32 activations and 14 bytes of provenance per row; int8 has a float32 scale per side
    assert [line.split() for line in lines[2:6]] == [
        ["float32", "142", "bytes", "per", "row,", "8.52", "GB", "in", "all"],
        ["bfloat16", "78", "bytes", "per", "row,", "4.68", "GB", "in", "all"],
        ["float16", "78", "bytes", "per", "row,", "4.68", "GB", "in", "all"],
        ["int8", "54", "bytes", "per", "row,", "3.24", "GB", "in", "all"],
    ]
    assert lines[6].endswith(" GB free; nothing was written")
    assert list(tmp_path.iterdir()) == []
    answer = command(capsys, *cache_command(tmp_path / "new", "--tokens", "all", "--dry-run"))
    assert answer.out.startswith("the whole dataset of layer0")


def test_extend_widen_and_shuffle_work_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache"
    assert command(capsys, *cache_command(path, "--quiet")) == Answer(0, "", "")
    extended = command(capsys, "extend", path, "--tokens", 700).out
    assert extended.startswith(f"{path}: 700 train rows, 60 heldout rows of layer0; +200 rows (")
    widened = command(capsys, "widen", path, "--layers", "all", "--json")
    assert json.loads(widened.out)["path"] == str(path)
    again = command(capsys, "widen", path, "--layers", "all").out
    assert again.startswith(f"{path}: 700 train rows, 60 heldout rows of layer0, layer1; nothing to add")
    copied = path / "epochs/train-generation2-seed0-epoch0"
    assert command(capsys, "shuffle", path).out == f"{copied}: training reads epoch 0 from here\n"
    assert verify_bytes(path) == []
    answer = command(capsys, "extend", path, "--tokens", "many")
    assert (answer.code, "'many' is not a quantity" in answer.err) == (2, True)


def test_a_configuration_file_and_flags_make_the_same_cache_as_flags_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**settings().model_dump(mode="json"), "tokens": "1k", "seed": 9}))
    answer = command(
        capsys, "cache", "--config", config, "--tokens", 500, "--seed", 0, "--out", tmp_path / "a", "--threads", 1
    )
    assert answer.code == 0, answer.err
    command(capsys, *cache_command(tmp_path / "b"))
    assert differing(tree(tmp_path / "a"), tree(tmp_path / "b")) == []


def test_the_version_is_shown_with_those_of_what_results_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"pipeline, version {tailrace.__version__}"
    assert second.startswith(f"Python {sys.version.split()[0]}, ")
    assert f"torch {torch.__version__}" in third


def test_a_wrong_command_is_answered_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "chace")
    assert answer.code == 2
    assert "no command 'chace'; did you mean cache? There are" in answer.err
    answer = command(capsys, "cache", "--no-such-flag", "--out", "x")
    assert (answer.code, "no such option" in answer.err) == (2, True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    answer = command(capsys, name, "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: pipeline {name} ")
    assert name in command(capsys, "--help").out


def test_an_error_is_one_message_and_its_traceback_is_shown_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, "extend", tmp_path / "none", "--tokens", 5)
    assert (answer.code, answer.out) == (1, "")
    assert (
        answer.err
        == f"error: {tmp_path / 'none'}: there is no activation-cache here; check the path, or make it first\n"
    )
    with pytest.raises(ArtifactMissing):
        command(capsys, "--debug", "extend", tmp_path / "none", "--tokens", 5)
    assert not (tmp_path / "none").exists()


def interrupted_main(arguments: list[str], errors: str) -> None:
    """Run the command line and press Ctrl-C when the third unit is being put into its place."""
    torch.set_num_threads(1)
    # Tests started in the background by a shell inherit that interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rename = Path.rename

    def press(self: Path, target: Any) -> Path:
        if "train-unit-000002" in str(target) and "seals" not in str(target):
            os.kill(os.getpid(), signal.SIGINT)
        return rename(self, target)

    setattr(Path, "rename", press)  # noqa: B010 - mypy refuses to assign to a method
    with Path(errors).open("w") as sys.stderr, small_blocks():
        cli.main(arguments)


def test_ctrl_c_exits_with_130_and_the_same_command_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = cache_command(tmp_path / "cache", "--quiet")
    errors = tmp_path / "errors.txt"
    process = forked().Process(target=interrupted_main, args=([str(item) for item in arguments], str(errors)))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert [line for line in errors.read_text().splitlines() if line] == [
        "stopping after what runs now; Ctrl-C again stops at once",
        "stopped; what is finished is kept: run the same command again to continue",
    ]
    n_kept = len(list(tmp_path.glob("cache/commits/0/train-unit-*.json")))
    assert 3 <= n_kept <= 8
    assert not list(tmp_path.rglob(".*.tmp*"))
    assert command(capsys, *arguments).code == 0
    run_cache(tmp_path / "expected")
    assert differing(tree(tmp_path / "cache"), tree(tmp_path / "expected")) == []


def begun(program: str) -> subprocess.Popen[bytes]:
    """Start a program that Ctrl-C interrupts, and return once it says that it has begun."""
    unblocked: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    command_line = [sys.executable, "-c", program]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, **unblocked)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


IN_A_LONG_CALL = """
import hashlib, sys
import click
from tailrace.pipeline import cli

@click.command()
def wait() -> None:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour in C, which Python cannot interrupt

cli.COMMANDS["wait"] = cli.Command("__main__", "", "wait")
cli.main(["wait"])
"""


def test_ctrl_c_is_acknowledged_inside_a_long_call_and_a_second_one_ends_it() -> None:
    with begun(IN_A_LONG_CALL) as process:
        assert process.stderr is not None
        busy = psutil.Process(process.pid)
        before = busy.cpu_times().user
        while busy.cpu_times().user < before + 0.2:  # until it is inside the call
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"stopping after what runs now; Ctrl-C again stops at once\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (130, b"")


IN_A_DESTRUCTOR = """
import time
import click
from tailrace.pipeline import cli

class Slow:
    def __del__(self) -> None:
        print("begun", flush=True)
        time.sleep(60)  # is interrupted, and the interrupt is swallowed

@click.command()
def wait() -> None:
    Slow()
    time.sleep(60)
    print("went on", flush=True)

cli.COMMANDS["wait"] = cli.Command("__main__", "", "wait")
cli.main(["wait"])
"""


def test_ctrl_c_that_a_destructor_swallows_stops_the_command_all_the_same() -> None:
    with begun(IN_A_DESTRUCTOR) as process:
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=50)
    assert (process.returncode, said) == (130, b"")
    assert [line for line in errors.decode().splitlines() if line] == [
        "stopping after what runs now; Ctrl-C again stops at once",
        "stopped; what is finished is kept: run the same command again to continue",
    ]


def test_ctrl_c_that_comes_as_the_cause_of_another_error_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(cli.cli, "main", interrupted)
    answer = command(capsys, "ls")
    assert (answer.code, answer.err) == (
        130,
        "stopped; what is finished is kept: run the same command again to continue\n",
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["e"], ["extend", "evaluate", "export"]),
        (["cache", "--storage-dtype", "b"], ["bfloat16"]),
        (["cache", "--toke"], ["--tokens", "--token-rows"]),
        (["query", "--form"], ["--format"]),
    ],
)
def test_the_shell_completes_commands_options_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: list[str], offered: list[str]
) -> None:
    monkeypatch.setenv("_PIPELINE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["pipeline", *typed]))
    monkeypatch.setenv("COMP_CWORD", str(len(typed)))
    assert command(capsys).out.split() == [f"plain,{word}" for word in offered]


def test_completing_a_command_loads_none_of_them() -> None:
    program = (
        "import sys\nfrom tailrace.pipeline.cli import main\ntry: main([])\nfinally: assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "_PIPELINE_COMPLETE": "zsh_complete", "COMP_WORDS": "pipeline ", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert [line for line in found.stdout.splitlines() if line in cli.COMMANDS] == list(cli.COMMANDS)
