"""Checks that stand alone: each fits into the time left or is skipped, and is written down as it ends."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["correctness", "cost"]
Status = Literal["ok", "wrong", "failed", "skipped"]
Numbers = Mapping[str, Any]
"""By name; a value is a number, a word, or numbers by name."""

OPTIONAL = ("datasets", "kvikio", "numba", "pyarrow", "tokenizers", "transformer_lens", "transformers", "triton")
"""Packages without which a check is skipped; others are needed by all."""


TOLERANCE = 2e-3
"""Relative. A device sums products in another order, 1e-7 a step, which a few dozen steps at a high learning rate and
choices between nearly equal activations amplify."""


class WrongError(Exception):
    """The device does not do what the CPU does."""


class NotHereError(Exception):
    """This machine cannot run the check; the text says what is missing."""


@dataclass(frozen=True)
class Check:
    """One thing to find out."""

    name: str
    kind: Kind
    seconds: float
    """What it is likely to take on a GPU; it is not begun with less time left."""
    run: Callable[[], Numbers]
    """Raises WrongError or NotHereError; any other error is a failure."""


@dataclass(frozen=True)
class Outcome:
    """What became of a check."""

    check: str
    kind: Kind
    status: Status
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    at: list[str] = field(default_factory=list)
    """The innermost lines of a failure."""


class Record:
    """The outcomes of a file with one JSON object a line, each on disk before the next check begins."""

    def __init__(self, path: Path, *, continued: bool = False) -> None:
        self._path = path
        self.outcomes: list[Outcome] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if continued:
            self.outcomes = [Outcome(**json.loads(line)) for line in path.read_text().splitlines()]
        else:
            path.write_text("")

    def add(self, outcome: Outcome) -> None:
        """Write an outcome down."""
        self.outcomes.append(outcome)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def has_failed(self) -> bool:
        """Whether a check of correctness was wrong or did not run to its end."""
        return any(outcome.kind == "correctness" and outcome.status in ("wrong", "failed") for outcome in self.outcomes)


def outcome_of(check: Check) -> Outcome:
    """Run a check."""
    began = time.monotonic()
    status: Status = "ok"
    numbers: Numbers = {}
    why, at = "", []
    try:
        numbers = check.run()
    except WrongError as error:
        status, why = "wrong", str(error)
    except NotHereError as error:
        status, why = "skipped", str(error)
    except Exception as error:
        if package := missing_package(error):
            status, why = "skipped", f"{package} is not installed"
        else:
            status, why = "failed", f"{type(error).__name__}: {str(error).strip()[:600]}"
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            at = [f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in frames]
    return Outcome(check.name, check.kind, status, round(time.monotonic() - began, 2), rounded(numbers), why, at)


def agreement(there: Mapping[str, float], here: Mapping[str, float], tolerance: float) -> float:
    """Return the largest relative difference; raise WrongError beyond ``tolerance``, and naming each number that is.

    Numbers below ``tolerance`` are compared as they are.
    """
    if there.keys() != here.keys():
        raise WrongError(f"the device gives other numbers: {sorted(there.keys() ^ here.keys())}")
    differences = {}
    for name, wanted in here.items():
        scale = max(abs(wanted), tolerance)
        differences[name] = abs(there[name] - wanted) / scale if there[name] != wanted else 0.0
    wrong = [
        f"{name} is {there[name]:.6g} on the device and {here[name]:.6g} on the CPU"
        for name, difference in differences.items()
        if not difference <= tolerance and not (math.isnan(there[name]) and math.isnan(here[name]))
    ]
    if wrong:
        raise WrongError("; ".join(wrong))
    return max(differences.values(), default=0.0)


def missing_package(error: Exception) -> str | None:
    """Return the optional package that an import did not find; None for any other error, a broken package's too."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.split(".")[0]
    return package if package in OPTIONAL and importlib.util.find_spec(package) is None else None


def run_checks(
    checks: Iterable[Check],
    record: Record,
    *,
    seconds_left: Callable[[], float],
    broken: Callable[[], bool],
    begin_anew: Callable[[], None],
    patience: float | None,
    say: Callable[[str], None],
) -> None:
    """Run the checks that ``record`` does not have yet.

    A device that no longer answers would fail every later check: where ``broken`` says so after a failure, or a check
    has taken ``patience`` times what was expected (None: wait for ever), ``begin_anew`` replaces this process by one
    that continues ``record``.
    """
    known = {outcome.check for outcome in record.outcomes}
    for check in checks:
        if check.name in known:
            continue
        if seconds_left() < check.seconds:
            why = f"{max(0, seconds_left()):.0f} s left, it needs about {check.seconds:.0f}; give more --minutes"
            outcome = Outcome(check.name, check.kind, "skipped", 0, why=why)
        else:
            with _Watch(check, record, begin_anew, None if patience is None else patience * check.seconds):
                outcome = outcome_of(check)
        record.add(outcome)
        say(line_of(outcome))
        if outcome.status == "failed" and broken():
            begin_anew()


class _Watch:
    """Writes a check down as failed, and begins anew, where it does not end: no exception reaches a kernel."""

    def __init__(self, check: Check, record: Record, begin_anew: Callable[[], None], seconds: float | None) -> None:
        def give_up() -> None:
            why = f"did not end in {seconds:.0f} s"
            record.add(Outcome(check.name, check.kind, "failed", seconds or 0, why=why))
            begin_anew()

        self._timer = None if seconds is None else threading.Timer(seconds, give_up)

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def rounded(value: Any) -> Any:
    """Return numbers with four digits, in JSON's types; what is neither number nor container becomes text."""
    if isinstance(value, Mapping):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return float(f"{value:.4g}") if isinstance(value, float) else str(value)


def line_of(outcome: Outcome) -> str:
    """Return an outcome for a terminal."""
    return f"{outcome.status:8}{outcome.check:44}{outcome.seconds:7.1f} s  {_words(outcome)}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as Markdown, what is not ok first."""
    counts = {status: sum(o.status == status for o in outcomes) for status in ("ok", "wrong", "failed", "skipped")}
    lines = [
        ", ".join(f"{n} {status}" for status, n in counts.items()),
        "",
        "| check | result | s | numbers |",
        "|---|---|--:|---|",
    ]
    order = ("wrong", "failed", "ok", "skipped")
    lines += [
        f"| {outcome.check} | {outcome.status} | {outcome.seconds:.1f} | {_words(outcome)} |"
        for outcome in sorted(outcomes, key=lambda outcome: order.index(outcome.status))
    ]
    return "\n".join(lines)


def _words(outcome: Outcome) -> str:
    said = outcome.why if outcome.why else ", ".join(_flat(outcome.numbers))
    if outcome.at:
        said += f" ({' < '.join(reversed(outcome.at[-3:]))})"
    return " ".join(said.replace("|", "/").split())[:1000]


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name} {value}"
