"""What no stage expects ends as one sentence: a refusal of the system, a fault of the program, a reader that left."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from tailrace.pipeline import cli
from tests.support.cache_jobs import command
from tests.support.paths import ROOT


def test_a_refusal_of_the_system_names_the_file_and_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/runs/a")
    monkeypatch.setattr(cli.cli, "main", Mock(side_effect=refused))
    answer = command(capsys, "info", "somewhere")
    assert answer.code == 1
    assert answer.err == (
        "error: /runs/a: Too many open files. What is finished is kept: put that right, then run the same command "
        "again to continue\n"
    )


def test_a_fault_of_the_program_is_a_sentence_and_a_file_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli.cli, "main", Mock(side_effect=KeyError("site")))
    answer = command(capsys, "info", "some where")
    assert answer.code == 70
    (file,) = tmp_path.iterdir()
    assert answer.err.startswith(f"error: a fault of this program (KeyError: 'site'); the traceback is in {file}.")
    text = file.read_text()
    assert text.startswith("pipeline info 'some where'\npipeline, version ")
    assert re.search(r"Traceback .+\n(.+\n)+KeyError: 'site'\n$", text)
    with pytest.raises(KeyError):
        cli.main(["--debug", "info"])


def test_a_reader_that_leaves_ends_the_command_silently() -> None:
    script = "from tailrace.pipeline.cli import main; import os; os.close(0); main(['--help'])"
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, b"")
