"""Damage to files, a folder of inputs, and commands that are interrupted or run to their ends."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.storage.artifact import MANIFEST
from tests.released.golden import TIMED
from tests.released.values import VALUES
from tests.support.cache_jobs import Answer, command

RELEASE = sorted(path.parent for path in Path(__file__).parents[1].glob(f"released/*/{VALUES}"))[-1]
"""Artifacts of every kind, as the last release wrote them."""


Damage = Callable[[Path, np.random.Generator], None]
"""Damages a file at random."""


def flip(path: Path, random: np.random.Generator) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
    else:
        path.write_bytes(b"\1")


def cut(path: Path, random: np.random.Generator) -> None:
    """Take some bytes off the end."""
    data = path.read_bytes()
    path.write_bytes(data[: int(random.integers(len(data)))] if data else b"")


def add(path: Path, random: np.random.Generator) -> None:
    """Append some bytes."""
    path.write_bytes(path.read_bytes() + random.bytes(int(random.integers(1, 9))))


def zero(path: Path, random: np.random.Generator) -> None:
    """Write zeros over a part, as a lost block reads."""
    data = bytearray(path.read_bytes())
    start = int(random.integers(max(1, len(data))))
    stop = min(len(data), start + 64)
    path.write_bytes(bytes(data[:start]) + bytes(stop - start) + bytes(data[stop:]))


def empty(path: Path, random: np.random.Generator) -> None:
    """Leave nothing but the name."""
    path.write_bytes(b"")


def delete(path: Path, random: np.random.Generator) -> None:
    """Take the name away."""
    path.unlink()


DAMAGES: tuple[Damage, ...] = (flip, cut, add, zero, empty, delete)


def files_below(folder: Path) -> list[Path]:
    """Return the files that are part of an artifact or a draft."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every such file by its name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_below(folder)}


def released(folder: Path, *names: str) -> Path:
    """Copy inputs of the last release into ``folder``; return it."""
    for name in ("model", "text.jsonl", *names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = RELEASE / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    return folder


def pipeline(capsys: pytest.CaptureFixture[str], folder: Path, line: str) -> Answer:
    """Run a command line in ``folder``."""
    with chdir(folder):
        return command(capsys, *shlex.split(line))


class Interrupted(BaseException):
    """Stands for a kill: nothing is written after it."""


@contextmanager
def interruption(name: str, count: int = 1) -> Iterator[None]:
    """Raise Interrupted after the ``count``-th rename to a name that holds ``name``, which comes inside the block."""
    rename, seen = Path.rename, [0]

    def counted(self: Path, target: Any) -> Path:
        if seen[0] >= count:
            raise Interrupted
        renamed = rename(self, target)
        seen[0] += name in str(target)
        if seen[0] >= count:
            raise Interrupted
        return renamed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        try:
            yield
        except Interrupted:
            return
    raise AssertionError(f"nothing was renamed to {name}")


def is_refusal(answer: Answer) -> bool:
    """Return whether a command ended with an error that it explains: no traceback, a message and exit code 1 or 2."""
    return answer.code in (1, 2) and "error: " in answer.err and "Traceback" not in answer.err


def published(folder: Path) -> bool:
    """Return whether an artifact lies in a folder."""
    return (folder / MANIFEST).exists()
