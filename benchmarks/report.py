"""The form of every result: a table for people, then one line of JSON for programs, and both in results/ on request."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Rates

RESULTS = Path(__file__).parent / "results"
_SCRATCH = Path(__file__).parent / ".envs"


@dataclass(frozen=True)
class Arguments:
    """What every benchmark script is told."""

    quick: bool
    record: bool
    scratch: Path
    revision: str = ""
    """Of this repository's history, for the one script that asks for it."""


def parse_arguments(description: str, revision: str | None = None) -> Arguments:
    """Parse ``--quick``, ``--record`` and ``--scratch``; and a revision, if the script has help for one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute: a check, not a result")
    parser.add_argument("--record", action="store_true", help="write results/<date>-<name>.json and .md")
    parser.add_argument("--scratch", type=Path, default=_SCRATCH, help="folder on the disk to be measured")
    if revision is not None:
        parser.add_argument("revision", help=revision)
    found = parser.parse_args()
    # so that what lies in the scratch folder is deleted, and a process under way ended, when this one is told to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return Arguments(**vars(found))


@contextmanager
def scratch_folder(arguments: Arguments) -> Iterator[Path]:
    """Yield a folder on the disk to be measured; it is deleted at the end."""
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=arguments.scratch) as folder:
        yield Path(folder)


@dataclass
class Report:
    """One benchmark's result."""

    name: str
    title: str
    setup: str
    """What was done, how often, and what every contender had to do with it."""
    columns: tuple[str, ...]
    packages: tuple[str, ...]
    """Distributions whose versions belong to the result."""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    """Ratio → what it should be, e.g. ``≥ 0.8``."""
    extra_versions: dict[str, str] = field(default_factory=dict)

    def add_rates(self, rates: Rates, names: Sequence[str], to: str, scale: float, group: str = "") -> None:
        """Add one row per contender: median rate, ratio to a baseline, its range over rounds."""
        for name in names:
            cells = (name, f"{rates.median(name) / scale:.3g}", f"{rates.ratio(name, to):.3g}", rates.spread(name, to))
            self.rows.append((group, *cells) if group else cells)

    def finish(self, arguments: Arguments) -> None:
        """Print the table and, last, the ratios as one JSON object; record both if asked to."""
        rounded = {name: float(f"{value:.4g}") for name, value in self.ratios.items()}
        facts = machine_facts(self.packages, arguments.scratch) | self.extra_versions
        text = self._markdown(rounded, facts, quick=arguments.quick)
        print(text)
        if arguments.record:
            self._record(text, rounded, facts, quick=arguments.quick)
        print(json.dumps(rounded))

    def _markdown(self, ratios: dict[str, float], facts: dict[str, Any], *, quick: bool) -> str:
        lines = [f"# {self.title}", "", self.setup, ""]
        if quick:
            lines += ["**Quick sizes: shows that the script works, not how fast anything is.**", ""]
        lines += [_line(self.columns), _line(["---"] * len(self.columns)), *map(_line, self.rows), ""]
        lines += [_line(("ratio", "measured", "target")), _line(["---"] * 3)]
        lines += [_line((f"`{name}`", f"{value:g}", self.targets.get(name, ""))) for name, value in ratios.items()]
        return "\n".join([*lines, "", *(f"* {name}: {value}" for name, value in facts.items()), ""])

    def _record(self, text: str, ratios: dict[str, float], facts: dict[str, Any], *, quick: bool) -> None:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        path = RESULTS / f"{date}-{self.name}"
        RESULTS.mkdir(exist_ok=True)
        content = {
            "benchmark": self.name,
            "date": date,
            "quick": quick,
            "machine": facts,
            "columns": self.columns,
            "rows": self.rows,
            "ratios": ratios,
            "targets": self.targets,
        }
        path.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        path.with_suffix(".md").write_text(text)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine_facts(packages: Sequence[str], folder: Path) -> dict[str, str]:
    """Return what must be known of the machine and the software to read a figure."""
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "disk": _file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    model = named.get("model name", platform.processor())
    return f"{model} (family {named.get('cpu family')}, model {named.get('model')})"


def _file_system(folder: Path) -> str:
    there = str(folder.resolve())
    mounts = [part for part in psutil.disk_partitions(all=True) if there.startswith(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
