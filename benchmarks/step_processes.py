"""The parent's end of step_server.py: contenders as processes that wait until it is their turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HERE = Path(__file__).parent
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}


class ContenderFailedError(RuntimeError):
    """A contender's process ended with an error, which the message holds."""


@dataclass(frozen=True)
class Side:
    """Whose code a contender is: the Python it runs under and its script in benchmarks/."""

    name: str
    script: str
    python: Path | str = sys.executable


@dataclass(frozen=True)
class Turn:
    """What a process measured of its own steps."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class StepProcess:
    """One contender, alive from ``with`` to its end; made ready (and warm) before the first turn."""

    def __init__(self, side: Side, architecture: str, mode: str, folder: Path, *, warm_up_steps: int = 2) -> None:
        self.side, self.mode = side, mode
        self.l0 = float("nan")
        self.versions: dict[str, str] = {}
        self.peak_bytes = 0
        self._arguments = {
            "architecture": architecture,
            "mode": mode,
            "folder": str(folder),
            "warm_up_steps": warm_up_steps,
        }

    @property
    def name(self) -> str:
        """Whose, and in which mode."""
        return f"{self.side.name}, {self.mode}"

    def __enter__(self) -> Self:
        """Start the process and wait until it is ready. Raises ContenderFailedError."""
        variables = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(_HERE.parent), "HF_HUB_OFFLINE": "1"}
        variables |= {"PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled"}
        self._complaints = tempfile.TemporaryFile("w+")
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        arguments = json.dumps({**self._arguments, "answer_pipe": writing})
        self._process = subprocess.Popen(
            [str(self.side.python), str(_HERE / self.side.script), arguments],
            stdin=subprocess.PIPE,
            stdout=self._complaints,
            stderr=self._complaints,
            pass_fds=(writing,),
            text=True,
            env=variables,
        )
        os.close(writing)
        try:
            ready = self._read()
        except BaseException:
            self._end()
            raise
        self.l0, self.versions = ready["l0"], ready["versions"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._end()

    def take(self, steps: int) -> Turn:
        """Have it take some steps. Raises ContenderFailedError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        turn = Turn(**self._read())
        self.peak_bytes = turn.peak_bytes
        return turn

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        answer = dict(json.loads(line)) if line else {}
        if not line or "error" in answer:
            raise ContenderFailedError(answer.get("error") or self._last_complaint())
        return answer

    def _last_complaint(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines() or ["(it said nothing)"]
        return f"ended with code {code}: {lines[-1]}"

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._answers.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._complaints.close()
