"""Help, completion and wrong settings load none of the libraries that take long: they are for running a command."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SLOW = ("torch", "zarr", "transformers", "transformer_lens", "datasets", "dask", "numba", "duckdb", "pyarrow")

HELP = """
import sys
import click
from click.shell_completion import BashComplete
from click.testing import CliRunner
from tailrace.pipeline.cli import COMMANDS, cli

def pages(command, words):
    for flags in ([], ["--help-all"]) if hasattr(command, "sections") else ([],):
        answer = CliRunner().invoke(cli, [*words, *(flags or ["--help"])])
        assert answer.exit_code == 0 and "Usage: " in answer.output, (words, answer.output)
    for name, inner in getattr(command, "commands", {}).items():
        pages(inner, [*words, name])

for name in COMMANDS:
    pages(cli.get_command(click.Context(cli), name), [name])
    assert CliRunner().invoke(cli, [name, "--no-such-flag"]).exit_code == 2, name
    if name != "blind":
        offered = BashComplete(cli, {}, "pipeline", "_PIPELINE_COMPLETE").get_completions([name], "--")
        assert "--help" in [item.value for item in offered], name
assert len(COMMANDS) > 15
"""

WRONG = """
import sys
from tailrace.pipeline import cli

try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 2, stop.code
"""


def loaded(program: str, *arguments: str) -> list[str]:
    """Return the slow libraries that a program of another process has imported at its end."""
    asked = f"{program}\nprint(*(name for name in {SLOW} if name in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", asked, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_help_completion_and_unknown_flags_of_every_command_load_no_slow_library() -> None:
    assert loaded(HELP) == []


def test_the_count_sees_what_a_stage_loads_and_knows_libraries_by_their_names() -> None:
    assert {"torch", "zarr"} <= set(loaded("import sys, tailrace.pipeline.train.stage"))
    assert [name for name in SLOW if find_spec(name) is None] == []


@pytest.mark.parametrize(
    "words",
    [
        ("cache", "--model", "m", "--dataset", "d", "--layers", "3", "--tokens", "x"),
        ("train", "cache", "--k", "x"),
        ("train", "cache", "--sweep", "k=1,x"),
        ("circuits-model", "--k", "x"),
        ("analyze", "transcoder", "--cache", "cache", "--rows", "x"),
        ("evaluate", "transcoder", "--cache", "cache", "--contexts", "x"),
        ("circuit", "text", "--transcoders", "t", "--branches", "x"),
        ("task", "prompts", "--transcoders", "t", "--leave-out", "x"),
        ("export", "transcoder", "--to", "saelens", "--rows", "x"),
        ("import", "files", "--from", "saelens", "--cache", "cache", "--rows", "x"),
    ],
    ids=lambda words: words[0],
)
def test_wrong_settings_are_refused_before_a_slow_library_is_loaded(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert loaded(WRONG, *words, "--out", str(tmp_path / "out")) == []
