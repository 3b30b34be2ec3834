"""The laboratory: commands as users type them, in processes whose every system call on files can be made to fail.

Processes are forked from a server that has imported everything and has ``faults.c`` preloaded. All lies in memory where
there is a file system for that, so that a case takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from tailrace.pipeline import cli
from tests.support.cache_jobs import small_blocks
from tests.support.forked import fault_library, forked

MEMORY = Path("/dev/shm")
TIMEOUT = 120
"""Seconds after which a command is said to hang; the longest takes three."""
HANGS = 124
"""Exit code of a command that did not end, as that of ``timeout``."""


class Mode(IntEnum):
    """What happens at a call; as in ``faults.c``."""

    OFF = 0
    COUNT = 1
    KILL = 2
    TEAR = 3
    """Half of a write is done, any other call whole, then the process is killed."""
    REFUSE_ONE = 4
    REFUSE_FROM = 5
    """This call and all that follow are refused, as by a full disk."""
    REFUSE_OPEN = 6
    REFUSE_READ = 7
    REFUSE_STAT = 8
    REFUSE_LIST = 9


class _State(ctypes.Structure):
    _fields_ = (
        ("mode", ctypes.c_int),
        ("error", ctypes.c_int),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("hit", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("root", ctypes.c_char * 4096),
        ("file", ctypes.c_char * 4096),
        ("what", ctypes.c_char * 4096),
    )


class Fault(NamedTuple):
    """What to do at the ``at``-th call that changes files, or at every call that asks about ``file``."""

    mode: Mode = Mode.COUNT
    at: int = 0
    error: int = 0
    file: Path | None = None


class Signal(NamedTuple):
    """A signal for a command, some seconds after its process began; SIGSTOP is followed by SIGCONT."""

    after: float
    number: signal.Signals


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Minus the number of the signal that killed it."""
    said: str
    hit: str
    """The call at which the fault happened, with its path; empty if it never came."""
    seconds: float

    def problem(self, *allowed: int) -> str | None:
        """Return what is wrong with an end, if it is: a traceback, no word of why, or a code that is not allowed."""
        last = (self.said.strip().splitlines() or ["nothing was said"])[-1]
        if self.code == HANGS:
            return "hangs"
        if "Traceback (most recent" in self.said:
            return f"traceback: {last}"
        if self.code not in allowed:
            return f"exit code {self.code}: {last}"
        named = any(word in self.said for word in ("error: ", "\nproblem: "))
        return "no error was said" if self.code == 1 and not named else None


ASKS = ("read", "stat", "list")
"""Calls that change nothing: a file is opened to be read, a name looked at, a folder listed."""


class Call(NamedTuple):
    """A system call of a command's record."""

    name: str
    path: str
    other: str
    """Where a file went, for a call with two paths."""
    offset: int
    size: int
    inode: int
    data: bytes

    @property
    def changes(self) -> bool:
        """Whether the call counts: one that failed counts too."""
        return self.name not in ASKS


def read_calls(path: Path) -> Iterator[Call]:
    """Yield the calls that ``faults.c`` recorded in a file."""
    with path.open("rb") as file:
        while line := file.readline():
            name, source, other, *numbers = os.fsdecode(line.rstrip(b"\n")).split("\t")
            offset, size, inode = map(int, numbers)
            data = file.read(size) if name == "write" else b""
            file.read(1)
            yield Call(name, source, other, offset, size, inode, data)


@dataclasses.dataclass
class Lab:
    """A folder whose file calls are watched, and a state that is shared with processes under test."""

    folder: Path
    """What commands run in; calls on files below it are counted, refused and recorded."""
    _side: Path
    _state: Any

    @classmethod
    def open(cls) -> Self:
        """Make an empty laboratory."""
        memory = str(MEMORY) if MEMORY.is_dir() else None
        side = Path(tempfile.mkdtemp(prefix="faults-", dir=memory)).resolve()
        (side / "world").mkdir()
        (side / "orders").write_bytes(bytes(ctypes.sizeof(_State)))
        with (side / "orders").open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), ctypes.sizeof(_State))
        return cls(side / "world", side, _State.from_buffer(mapped))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._side)

    @property
    def log(self) -> Path:
        """Where the last command that was recorded left its calls."""
        return self._side / "calls"

    def run(
        self, *commands: Sequence[str], fault: Fault | None = None, signals: Sequence[Signal] = (), record: bool = False
    ) -> Outcome:
        """Run commands in a process, one after the other until one fails."""
        state, chosen = self._state, fault or Fault(Mode.COUNT)
        state.mode, state.at, state.error, state.count, state.hit = chosen.mode, chosen.at, chosen.error, 0, 0
        state.root, state.file = os.fsencode(self.folder), os.fsencode(chosen.file or "")
        self.said.write_bytes(b"")
        process = forked().Process(target=_perform, args=(self, commands, record))
        process.start()
        started = self._begun(process)
        for sent in signals:
            process.join(max(0.0, started + sent.after - time.monotonic()))
            _send(process, sent.number)
        process.join(TIMEOUT)
        code = HANGS if process.exitcode is None else process.exitcode
        _end_group(process)
        hit = os.fsdecode(state.what) if state.hit else ""
        said = self.said.read_text(errors="replace")
        return Outcome(code, said, hit.replace(f"{self.folder}/", ""), time.monotonic() - started)

    def _begun(self, process: Any) -> float:
        """Return the time when the first command begins; before, signals are not answered by it."""
        while process.exitcode is None and not self.said.stat().st_size:
            time.sleep(0.001)
        return time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process under test needs: the state, it maps itself."""
        return {"folder": self.folder, "_side": self._side}

    @property
    def said(self) -> Path:
        """What commands printed, each below its command line."""
        return self._side / "said"

    @property
    def orders(self) -> Path:
        """The file of the state that is shared."""
        return self._side / "orders"

    @property
    def n_calls(self) -> int:
        """Calls of the last command that count."""
        return int(self._state.count)


def _send(process: Any, number: signal.Signals) -> None:
    if process.exitcode is not None:
        return
    with suppress(ProcessLookupError):  # it ended a moment ago
        os.kill(process.pid, number)
        if number == signal.SIGSTOP:
            process.join(0.1)
            os.kill(process.pid, signal.SIGCONT)


def _end_group(process: Any) -> None:
    """End what a command left running; its process began a group of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _perform(lab: Lab, commands: Sequence[Sequence[str]], record: bool) -> None:
    """Run commands in this process, which ends with them."""
    os.setpgid(0, 0)
    os.chdir(lab.folder)
    output = os.open(lab.said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    armed = ctypes.CDLL(None).faults_arm(os.fsencode(lab.orders), os.fsencode(lab.log) if record else None)
    assert armed == 0, "the laboratory's library could not open its files"
    code = 0
    with small_blocks():
        for command in commands:
            if code == 0:
                sys.stderr.write(f"$ pipeline {shlex.join(command)}\n")
                code = _code_of(command)
    sys.stdout.flush()
    os._exit(code)  # whatever the command left running is its own business


def _code_of(command: Sequence[str]) -> int:
    try:
        cli.main(list(command))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:  # after the command's own end
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def needs_compiler() -> str | None:
    """Return why there is no laboratory on this machine, or None."""
    if sys.platform != "linux":
        return f"system calls are caught on Linux only, this is {sys.platform}"
    if fault_library() is None:
        return "the laboratory needs a C compiler as `cc` (apt install gcc): crashes at system calls were not tried"
    return None
