"""What is done to every stage: crashes, refusals, power cuts and signals, and what must hold after each.

A case is a word, such as ``kill-17``, by which it can be repeated. After each, whatever looks published is verified,
a cache that was growing gives the rows that it had, and the same command again ends with the bytes of a run that
nothing disturbed, with nothing left beside them.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash
import zarr

from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import MANIFEST
from tailrace.storage.errors import ActionableError
from tailrace.storage.labels import FILE
from tailrace.storage.names import is_temporary
from tests.faults.lab import Call, Fault, Lab, Mode, Outcome, Signal, read_calls
from tests.faults.power_cut import CHANGES_BYTES, Disk, State
from tests.faults.stages import OUTPUT, STAGES, Stage, begin, command
from tests.released.golden import TIMED
from tests.storage.test_shard import read_tensorstore

KILLED = -SIGKILL
LEDGER = "ledger.jsonl"
"""Of a blind study, which imports much."""
_ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EMFILE")
_SIGNALS = (SIGKILL, SIGKILL, SIGKILL, SIGTERM, SIGINT, SIGINT, SIGSTOP)
_SIGNALLED = 1.1
"""Most that a signal is late, in times of the undisturbed run."""
_DISKS = 200
"""Disks of each stage that are judged, of the thousands that a power cut may leave."""
_BYTES_TRIED = 0.1
"""Share of calls that change bytes only, after which the power is cut."""


class Bench:
    """A stage in a laboratory, and what it makes if nothing disturbs it."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.stage: Stage = STAGES[name]
        self.output = lab.folder / OUTPUT
        self.made = self.output.parent
        self._start = lab.log.with_name("start")
        self._command = command(self.stage.line)
        begin(self.stage, lab.folder)
        for line in self.stage.before:
            self._must(command(line))
        shutil.rmtree(self._start, ignore_errors=True)
        self.made.rename(self._start)
        self._rows = _rows(self._start / self.output.name) if self.stage.changes_cache else None
        self.reset()
        self._disk = Disk(self.made)
        outcome = self._must(self._command, record=True)
        self.seconds, self._said = outcome.seconds, _without_ages(outcome.said)
        self.calls = list(read_calls(lab.log))
        self._expected = tree(self.made)

    def _must(self, line: list[str], *, record: bool = False) -> Outcome:
        outcome = self.lab.run(line, record=record)
        if outcome.code:
            raise RuntimeError(f"fails undisturbed:\n{outcome.said}")
        return outcome

    @property
    def changes(self) -> list[Call]:
        """The calls that change files, in the order of their numbers."""
        return [call for call in self.calls if call.changes]

    def disk(self, n_calls: int) -> Disk:
        """Return the disk after some of the calls."""
        disk = self._disk.copy()
        for call in self.calls[:n_calls]:
            disk.replay(call)
        return disk

    def reset(self) -> None:
        """Put back what the stage begins with."""
        shutil.rmtree(self.made, ignore_errors=True)
        shutil.copytree(self._start, self.made, symlinks=True)

    def run(self, fault: Fault | None = None, signals: Iterable[Signal] = ()) -> Outcome:
        """Run the stage's command, disturbed."""
        return self.lab.run(self._command, fault=fault, signals=tuple(signals))

    def difference(self, outcome: Outcome) -> str | None:
        """Return what an undisturbed run made otherwise, or said if saying is all it does; or None."""
        if self.stage.answers and _without_ages(outcome.said) != self._said:
            return f"another answer: {outcome.said[-1500:]}"
        found = tree(self.made)
        names = sorted(name for name in found.keys() | self._expected if found.get(name) != self._expected.get(name))
        if not names:
            return None
        kinds = (
            ("missing", [n for n in names if n not in found]),
            ("left", [n for n in names if n not in self._expected]),
        )
        others = [name for name in names if name in found and name in self._expected]
        return "; ".join(f"{kind}: {', '.join(some[:4])}" for kind, some in (*kinds, ("other bytes", others)) if some)

    def finish(self) -> list[str]:
        """Return what does not hold after a disturbance."""
        problems = []
        if self._rows is not None:
            try:
                if _rows(self.output, self._rows[0]) != self._rows:
                    problems.append("the rows that the cache had are others")
            except (ActionableError, OSError, ValueError) as error:
                problems.append(f"the rows that the cache had cannot be read: {error}")
        checks = [["verify", str(path.relative_to(self.lab.folder)), "--pairs", "0"] for path in _published(self.made)]
        again = [] if self.stage.refuses_again(self.output) else [self._command]
        if self.stage.keeps_ledger:
            again.append(command("blind study log {out}"))
        outcome = self.lab.run(*checks, *again)
        if (problem := outcome.problem(0)) is not None:
            last = outcome.said.rpartition("$ pipeline ")[2]
            problems.append(f"then: {problem}: {last[-1500:]}")
        elif (difference := self.difference(outcome)) is not None:
            problems.append(f"the same command again: {difference}")
        return problems


def _without_ages(said: str) -> str:
    return re.sub(r" +\d+ (s|min|h|d)  ", "", said)


def tree(folder: Path) -> dict[str, str]:
    """Return what lies below a folder, with digests of files."""
    found = {}
    for path in folder.rglob("*"):
        if path.name not in TIMED or path.name == LEDGER:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.name == FILE:  # labels say when they were given
        labels = pa.parquet.read_table(path)
        return repr((labels.schema, labels.drop_columns("updated").to_pylist()))
    if path.name == LEDGER:  # and so do the entries of a study, which `blind study log` checks
        return "a ledger"
    return str(path.readlink()) if path.is_symlink() else xxhash.xxh3_128_hexdigest(path.read_bytes())


def _published(folder: Path) -> list[Path]:
    """Return the folders that look published and lie in no other such, and in none that is being made or deleted."""
    every = (path.parent for path in folder.rglob(MANIFEST))
    found = sorted(path for path in every if not any(map(is_temporary, path.relative_to(folder).parts)))
    return [path for path in found if not any(other in path.parents for other in found)]


def _rows(cache: Path, generation: int | None = None) -> tuple[int, str]:
    """Return a generation of a cache, by default the newest, and a digest of all its rows."""
    state = xxhash.xxh3_128()
    opened = open_cache(cache, generation)
    for name in opened.manifest.splits:
        split = opened.split(name)
        keys = [*split.layout.encodings(), "token_id", "context", "position", "document"]
        for unit in range(split.n_units):
            for key, values in split.read_unit(unit, keys).items():
                state.update(key.encode())
                state.update(values.tobytes())
    return opened.manifest.generation, state.hexdigest()


def second_opinion(folder: Path) -> tuple[int, int]:
    """Read what is published below a folder with other systems, two of each; return how many arrays and tables agree.

    Raises AssertionError where they do not.
    """
    published = _published(folder)
    arrays = [path.parent for top in published for path in top.rglob("zarr.json") if b'"array"' in path.read_bytes()]
    for path in arrays:
        rows = np.asarray(zarr.open_array(zarr.storage.LocalStore(path, read_only=True), mode="r")[...])
        assert rows.tobytes() == read_tensorstore(path).tobytes(), f"{path}: zarr-python and tensorstore differ"
    tables = [path for top in published for path in top.rglob("*.parquet")]
    for path in tables:
        ours = pa.parquet.read_table(path, page_checksum_verification=True)
        theirs: Any = duckdb.read_parquet(str(path)).to_arrow_table()
        same = ours.to_pylist() == theirs.to_pylist()
        assert same or repr(ours.to_pylist()) == repr(theirs.to_pylist()), f"{path}: pyarrow and DuckDB differ"
    return len(arrays), len(tables)


def _classes(calls: list[Call]) -> list[list[int]]:
    """Return the numbers of calls, from 1, of each class: the same call on files whose names differ in numbers only."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, call in enumerate(calls, 1):
        path = re.sub(r"\.tmp-[^/]*|/\.tmp\w{6}", ".tmp", call.other or call.path)
        found.setdefault((call.name, re.sub(r"\d+", "#", re.sub(r"[0-9a-f]{16,}", "#", path))), []).append(number)
    return list(found.values())


def _crashes(bench: Bench, rng: random.Random) -> Iterator[str]:
    changes = bench.changes
    for numbers in _classes(changes):
        yield f"kill-{rng.choice(numbers)}"
        if changes[numbers[0] - 1].name == "write":
            yield f"tear-{rng.choice(numbers)}"


def _crash(bench: Bench, case: str) -> list[str]:
    """Kill the command before a call, or after half of what it writes."""
    word, number = case.split("-")
    outcome = bench.run(Fault(Mode[word.upper()], int(number)))
    _reached(outcome)
    return _unless(outcome.problem(KILLED))


def _refused_writes(bench: Bench, rng: random.Random) -> Iterator[str]:
    for numbers in _classes(bench.changes):
        yield f"{rng.choice(_ERRORS)}-one-{rng.choice(numbers)}"
        yield f"ENOSPC-from-{rng.choice(numbers)}"


def _refuse_write(bench: Bench, case: str) -> list[str]:
    """Refuse a call, or it and all that follow."""
    word, extent, number = case.split("-")
    mode = Mode.REFUSE_FROM if extent == "from" else Mode.REFUSE_ONE
    return _refused(bench, bench.run(Fault(mode, int(number), getattr(errno, word))))


_REFUSALS = {"read": ("open", "read"), "stat": ("stat",), "list": ("list",)}
"""How each call that changes nothing is refused."""
_REASONS = {
    "open": ("EACCES", "EIO", "EMFILE"),
    "read": ("EIO",),
    "stat": ("EACCES", "EIO"),
    "list": ("EACCES", "EIO", "EMFILE"),
}


def _refused_reads(bench: Bench, rng: random.Random) -> Iterator[str]:
    asked = {(call.name, os.path.relpath(call.path, bench.lab.folder)) for call in bench.calls if not call.changes}
    for call, name in sorted(asked):
        if ".tmp-" not in name:  # which holds the number of a process
            for refusal in _REFUSALS[call]:
                yield f"{rng.choice(_REASONS[refusal])}-{refusal}-{name}"


def _refuse_read(bench: Bench, case: str) -> list[str]:
    """Refuse to open a file, to read it, to look at a name or to list a folder."""
    word, refusal, name = case.split("-", 2)
    mode = Mode[f"REFUSE_{refusal.upper()}"]
    return _refused(bench, bench.run(Fault(mode, 0, getattr(errno, word), bench.lab.folder / name)))


def _refused(bench: Bench, outcome: Outcome) -> list[str]:
    _reached(outcome)
    problem = outcome.problem(0, 1)
    if problem is None and outcome.code == 0 and (difference := bench.difference(outcome)) is not None:
        problem = f"exit code 0, but {difference}"
    return _unless(problem)


class NotReached(Exception):
    """The command ended before the call came, or never read the file: threads differ in their order."""


def _reached(outcome: Outcome) -> None:
    if not outcome.hit:
        raise NotReached


def _signals(bench: Bench, rng: random.Random) -> Iterator[str]:
    for _ in range(14):
        times = sorted(rng.uniform(0, bench.seconds * _SIGNALLED) for _ in range(rng.choice((1, 1, 2))))
        yield "+".join(f"{rng.choice(_SIGNALS).name}@{after:.3f}" for after in times)


def _signal(bench: Bench, case: str) -> list[str]:
    """Send signals, each to a run of its own."""
    problems = []
    for one in case.split("+"):
        name, after = one.split("@")
        outcome = bench.run(signals=[Signal(float(after), Signals[name])])
        problems += _unless(outcome.problem(0, -Signals[name], 130))
        if bench.stage.refuses_again(bench.output):
            break
    return problems


def _power_cuts(bench: Bench, rng: random.Random) -> Iterator[str]:
    """Yield different disks, half of them with something that looks published, if there are as many."""
    disk = bench.disk(0)
    seen: set[bytes] = set()
    published: list[str] = []
    others: list[str] = []
    for number, call in enumerate(bench.calls, 1):
        disk.replay(call)
        if not call.changes or (call.name in CHANGES_BYTES and rng.random() > _BYTES_TRIED):
            continue
        for state in disk.states(number):
            if (digest := state.digest()) not in seen:
                seen.add(digest)
                is_published = any(name.endswith(f"/{MANIFEST}") for name in state.names)
                (published if is_published else others).append(f"{number}-{state.label}")
    rng.shuffle(published)
    rng.shuffle(others)
    half = max(_DISKS // 2, _DISKS - len(others))
    yield from published[:half]
    yield from others[: _DISKS - min(half, len(published))]


def _cut_power(bench: Bench, case: str) -> list[str]:
    """Leave a disk as after a power cut."""
    number, label = case.split("-", 1)
    states: dict[str, State] = {state.label: state for state in bench.disk(int(number)).states(int(number))}
    shutil.rmtree(bench.made)
    states[label].build()
    return []


def _unless(problem: str | None) -> list[str]:
    return [] if problem is None else [problem]


class Campaign(NamedTuple):
    """A kind of disturbance."""

    cases: Callable[[Bench, random.Random], Iterator[str]]
    disturb: Callable[[Bench, str], list[str]]

    def judge(self, bench: Bench, case: str) -> list[str]:
        """Return what does not hold in a case. Raises NotReached if nothing was disturbed."""
        bench.reset()
        return [*self.disturb(bench, case), *bench.finish()]


CAMPAIGNS = {
    "crash": Campaign(_crashes, _crash),
    "refused-write": Campaign(_refused_writes, _refuse_write),
    "refused-read": Campaign(_refused_reads, _refuse_read),
    "power-cut": Campaign(_power_cuts, _cut_power),
    "signal": Campaign(_signals, _signal),
}
