"""Environments of their own for other projects, made with pip below ``.envs`` and kept for the next run."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parent


def environment(
    name: str, requirements: Sequence[str], *, without: Sequence[str] = (), alone: Sequence[str] = ()
) -> Path:
    """Return the Python of the environment ``name``, made at first use; torch is the release this project pins.

    pip's own resolver chooses the rest: a peer may need other releases than this project's constraints. ``without``
    is removed afterwards: what a peer requires, does not need here, and cannot be imported beside this torch. ``alone``
    is installed without what it requires; the part that is needed here is then among ``requirements``.
    """
    folder = _HERE / ".envs" / name
    python = folder / "bin/python"
    wanted = [_pinned("torch"), *requirements]
    described = [*wanted, *(f"without {name}" for name in without), *(f"{name} alone" for name in alone)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests and benchmarks may want the same one at the same time
        _make(folder, wanted, without, alone, described)
    return python


def _make(
    folder: Path, wanted: Sequence[str], without: Sequence[str], alone: Sequence[str], described: list[str]
) -> None:
    python, done = folder / "bin/python", folder / "complete.json"
    if not done.exists() or json.loads(done.read_text()) != described:
        print(f"making the environment {folder} with {', '.join(described)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch alone first: nothing after it may pull in another build
        subprocess.run([*pip, wanted[0], "numpy"], check=True)
        subprocess.run([*pip, *wanted], check=True)
        if alone:
            subprocess.run([*pip, "--no-deps", *alone], check=True)
        if without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        done.write_text(json.dumps(described))


def _pinned(name: str) -> str:
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def run_script(python: Path | str, script: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run ``benchmarks/<script>`` in a fresh process with one JSON argument; return the JSON of its last line."""
    variables = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(_HERE / script), json.dumps(arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{script} {arguments} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
