"""Where no terminal watches, a command prints its result and its own errors: no progress bar, no library's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cache_jobs import command, model_folder, run_cache


@pytest.mark.slow
def test_no_command_draws_a_progress_bar_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, transcoder, tables = (tmp_path / name for name in ("cache", "transcoder", "tables"))
    run_cache(cache)
    settings = ("--steps", 3, "--batch-rows", 50, "--d-sae", 32, "--architecture", "topk", "--k", 4, "--threads", 1)
    for arguments in (
        ("shuffle", cache),
        ("verify", cache, "--threads", 1),
        ("widen", cache, "--layers", 1, "--threads", 1),
        ("train", cache, "--site", "layer0", "--out", transcoder, *settings),
        ("analyze", transcoder, "--cache", cache, "--out", tables, "--threads", 1),
        ("evaluate", transcoder, "--cache", cache, "--out", tmp_path / "evaluation", "--split", "train"),
    ):
        answer = command(capsys, *arguments)
        assert (answer.code, answer.out == "") == (0, False), answer
        assert _untold(answer.err, "warning: ") == []


def test_a_broken_file_is_named_by_our_error_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "bad.jsonl"
    text.write_text('{"text": "one"}\nnot json\n')
    what = ("--model", model_folder(), "--dataset", text, "--tokens", 64, "--layers", 0, "--context-length", 16)
    answer = command(capfd, "cache", *what, "--out", tmp_path / "cache")
    assert answer.code == 1
    (line,) = _untold(answer.err)
    assert line.startswith(f"error: {text}, row 2 (line 2): document 1 cannot be read")


def _untold(err: str, *told: str) -> list[str]:
    """The lines that no command says on purpose; the device's is said once a process, by whichever comes first."""
    return [line for line in err.splitlines() if not line.startswith(("device: ", "cost: ", *told))]
