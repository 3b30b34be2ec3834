"""Check a GPU: every stage against the CPU, then what it costs. Writes a line of JSON as each check ends.

Ends with a table to be pasted into an issue; the exit status is 1 if a check of correctness failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_check.outcomes import Check, Kind, Numbers, Record, run_checks, table

if TYPE_CHECKING:  # torch must not be imported before a pretended GPU is made
    from benchmarks.gpu_check.bench import Bench

FILE = "gpu_check.jsonl"
PATIENCE = 15.0
"""Times what a check is expected to take, after which it is given up."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {FILE} and the table")
    parser.add_argument("--minutes", type=float, default=5, help="what does not fit is skipped, and said so")
    parser.add_argument("--only", default="", help="checks whose names contain one of these words, by commas")
    parser.add_argument("--peers", type=Path, help="folder of other projects, as pip install --target makes it")
    parser.add_argument("--pretend", action="store_true", help="on a pretended GPU: correctness alone")
    parser.add_argument("--dry", action="store_true", help="costs alone, at sizes that show nothing; on the CPU")
    parser.add_argument("--continued", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = parse()
    began = time.monotonic() - (chosen.continued or 0.0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    offered: Any = nullcontext
    if chosen.pretend:  # before anything imports torch
        offered = import_module("tests.support.pretended_gpu").pretended_gpu
    from benchmarks.gpu_check import bench as benches

    uncompiled = benches.replace_numba()
    if not chosen.pretend:
        benches.leave_pretended_gpu_out()
    import torch

    on_gpu = not (chosen.pretend or chosen.dry)
    if on_gpu and not torch.cuda.is_available():
        print("torch sees no GPU; `pipeline doctor` says why, --pretend checks without", file=sys.stderr)
        return 2

    record = Record(chosen.out / FILE, continued=chosen.continued is not None)
    scratch = tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)

    def begin_anew() -> None:
        scratch.cleanup()
        sys.stdout.flush()
        kept = [word for word in sys.argv[1:] if not word.startswith("--continued")]
        arguments = [*kept, f"--continued={time.monotonic() - began}"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *arguments])

    with scratch:
        device = "cuda" if on_gpu or chosen.pretend else "cpu"
        bench = benches.Bench(device, Path(scratch.name), peers=chosen.peers, small=chosen.dry, offered=offered)
        words = [word.strip() for word in chosen.only.split(",") if word.strip()]
        run_checks(
            (check for check in checks(bench, chosen, uncompiled) if not words or any(w in check.name for w in words)),
            record,
            seconds_left=lambda: 60 * chosen.minutes - (time.monotonic() - began),
            broken=lambda: on_gpu and not answers(),
            begin_anew=begin_anew,
            patience=PATIENCE if on_gpu else None,
            say=lambda line: print(line, flush=True),
        )
    if not record.outcomes:
        print(f"--only {chosen.only}: no check has this in its name", file=sys.stderr)
        return 2
    written = table(record.outcomes)
    (chosen.out / "gpu_check.md").write_text(written + "\n")
    print(f"\n{written}")
    return int(record.has_failed or (chosen.dry and any(outcome.status == "failed" for outcome in record.outcomes)))


def checks(bench: Bench, chosen: argparse.Namespace, uncompiled: bool) -> Iterator[Check]:
    """Yield the checks: the machine first, then what is right, then what it costs."""
    costs = chosen.dry or not chosen.pretend
    if costs:
        yield from group("machine", "cost", bench)
    if not chosen.dry:
        yield from group("correctness", "correctness", bench)
    if costs:
        yield from group("step_cost", "cost", bench)
        yield from group("peers", "cost", bench)
        yield from group("stage_cost", "cost", bench, uncompiled=uncompiled)
    if not chosen.dry:  # last: each of these starts processes, and a machine with one GPU has none of them
        yield from group("processes", "correctness", bench)


def group(name: str, kind: Kind, bench: Bench, **more: Any) -> Iterator[Check]:
    """Yield the checks of a module; one check that says why, where it cannot be imported."""
    module = f"benchmarks.gpu_check.{name}"
    try:
        made = list(import_module(module).checks(bench, **more))
    except ImportError as error:
        made = [Check(name, kind, 0, partial(fail, error))]
    for check in made:
        # a case of correctness offers the device itself, and the CPU without it
        yield check if kind == "correctness" else replace(check, run=partial(within, bench, check.run))


def fail(error: Exception) -> Numbers:
    raise error


def within(bench: Bench, run: Callable[[], Numbers]) -> Numbers:
    with bench.offered():
        return run()


def answers() -> bool:
    """Return whether the GPU still computes: after some errors it does nothing more for this process."""
    import torch

    try:
        return torch.ones(1, device="cuda").add_(1).item() == 2
    except RuntimeError:
        return False


if __name__ == "__main__":
    sys.exit(main())
