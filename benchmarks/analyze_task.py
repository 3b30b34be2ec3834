"""The pass of analyze.py in a process that does nothing else, for its peak memory."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.analyze_rows import planted_subject
from benchmarks.memory_task import resident
from benchmarks.planted_rows import Problem
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.table import accumulators, write_tables
from tailrace.analysis.tables import TABLES


def main(arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    problem = Problem(**arguments["problem"])
    with tempfile.TemporaryDirectory(dir=arguments["folder"]) as folder:
        subject = planted_subject(problem, arguments["n_rows"], scratch=Path(folder))
        plan = Plan(activation_rows=arguments["n_rows"])
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from making the rows up
        harvest = gather(subject, plan, accumulators(TABLES))
        of_pass = resident("VmHWM") - before
        write_tables(TABLES, harvest, subject, plan, Path(folder) / "tables")
        peak = resident("VmHWM") - before
    print(json.dumps({"pass": of_pass, "peak": peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
