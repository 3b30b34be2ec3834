"""Runs campaigns until their time is over, counts, and says how to repeat what failed."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.faults.campaigns import CAMPAIGNS, Bench, NotReached, second_opinion
from tests.faults.lab import Lab, needs_compiler
from tests.faults.stages import STAGES, copy_release

FAILURES = Path("faults-failed.txt")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("campaigns", nargs="*", choices=[[], *CAMPAIGNS], help="default: all")
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all; may be repeated")
    parser.add_argument("--seconds", type=float, default=60, help="how long cases are begun (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="another one tries other calls and moments")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="cases of a campaign and stage in a round")
    parser.add_argument("--rounds", type=int, default=sys.maxsize, help="end after so many rounds over all stages")
    parser.add_argument("--case", action="append", help="CAMPAIGN/STAGE/CASE of a failure, to repeat it")
    return parser.parse_args(arguments)


class Tally:
    """Cases tried and failed, by campaign and stage."""

    def __init__(self) -> None:
        self.tried: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()
        self.agreed: Counter[str] = Counter()
        self.n_idle = 0
        """Cases in which nothing was disturbed; they do not count as tried."""

    def judge(self, campaign: str, stage: str, bench: Bench, case: str) -> None:
        """Try a case; print and write what fails, with the command that repeats it."""
        try:
            problems = CAMPAIGNS[campaign].judge(bench, case)
        except NotReached:
            self.n_idle += 1
            return
        self.tried[campaign, stage] += 1
        if problems:
            self.failed[campaign, stage] += 1
            lines = [f"python -m tests.faults --case '{campaign}/{stage}/{case}'", *problems]
            text = "\n    ".join("\n".join(lines).splitlines()) + "\n"
            _say(text)
            with FAILURES.open("a") as file:
                file.write(text)

    def second_opinion(self, campaign: str, bench: Bench) -> None:
        """Have other systems read what the last case ended with."""
        arrays, tables = second_opinion(bench.made)
        self.agreed["arrays of zarr-python and tensorstore"] += arrays
        self.agreed["tables of pyarrow and DuckDB"] += tables

    @property
    def n_tried(self) -> int:
        """All cases tried."""
        return self.tried.total()

    @property
    def n_failed(self) -> int:
        """Those of them that failed."""
        return self.failed.total()

    def show(self) -> None:
        """Print the counts."""
        for campaign in CAMPAIGNS:
            stages = {stage: n for (name, stage), n in self.tried.items() if name == campaign}
            failed = sum(self.failed[campaign, stage] for stage in stages)
            if stages:
                counts = ", ".join(f"{stage} {n}" for stage, n in stages.items())
                _say(f"{campaign}: {sum(stages.values())} cases in {len(stages)} stages, {failed} failed ({counts})")
        _say("; ".join(f"{n} {what} agree" for what, n in self.agreed.items()))
        _say(f"{self.n_idle} more cases disturbed nothing")


def rounds(asked: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Yield the number of a round and a stage, each stage once in a round, in an order of the round's own."""
    names = list(asked.stage or STAGES)
    for number in range(asked.rounds):
        order = random.Random(f"{asked.seed} {number}").sample(names, len(names))
        yield from ((number, name) for name in order)


def run(asked: argparse.Namespace) -> int:
    """Try cases until the time is over, or Ctrl-C; return how many failed."""
    tally = Tally()
    with Lab.open() as lab, suppress(KeyboardInterrupt):
        copy_release(lab.folder)
        _try_all(lab, asked, tally)
    tally.show()
    return tally.n_failed


def _try_all(lab: Lab, asked: argparse.Namespace, tally: Tally) -> None:
    end = time.monotonic() + asked.seconds
    for number, name in rounds(asked):
        bench = Bench(lab, name)
        for campaign in asked.campaigns or CAMPAIGNS:
            rng = random.Random(f"{asked.seed} {number} {name} {campaign}")
            cases = list(CAMPAIGNS[campaign].cases(bench, rng))
            for case in rng.sample(cases, min(asked.most, len(cases))):
                if time.monotonic() > end:
                    return
                tally.judge(campaign, name, bench, case)
            tally.second_opinion(campaign, bench)
        _say(f"{name}: {tally.n_tried} cases so far, {tally.n_failed} failed")


def repeat(cases: list[str]) -> int:
    """Try cases by their names; return how many failed."""
    tally = Tally()
    with Lab.open() as lab:
        copy_release(lab.folder)
        for text in cases:
            campaign, stage, case = text.split("/", 2)
            tally.judge(campaign, stage, Bench(lab, stage), case)
    tally.show()
    return tally.n_failed


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Do what a command line asks; return its exit code."""
    asked = parse(arguments)
    if (reason := needs_compiler()) is not None:
        _say(reason)
        return 1
    return int(bool(repeat(asked.case) if asked.case else run(asked)))
