"""Claim: peak memory of caching and of streaming does not grow with the number of rows.

Every figure is the peak resident set of a process of its own (VmHWM), and what of it came after the imports. Pages of
the kernel's file cache are not part of it. The cache stage runs the bundled tiny language model on real speeches.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peers import run_script
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.pipeline.samples.speeches import fetch_sotu

_ROWS_OF_STAGE = (100_000, 800_000)


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    few, many, shard_rows = (250_000, 2_000_000, 65_536) if arguments.quick else (1_000_000, 8_000_000, 262_144)
    report = Report(
        "memory",
        "Peak memory against rows",
        f"Caching and streaming: 64 + 64 bfloat16, units and buckets of {shard_rows:,} rows; streaming gathers one "
        "whole epoch. Stage: `pipeline cache` on the bundled tiny model, 128 + 128 float16, units of 16,384 rows.",
        ("what", "rows", "peak MB", "of it after imports"),
        ("numpy", "zarr", "torch"),
    )
    with scratch_folder(arguments) as folder:
        for n_rows in (few, many):
            task = {"path": str(folder / str(n_rows)), "n_rows": n_rows, "shard_rows": shard_rows}
            add(report, "cache", n_rows, {"task": "cache", **task})
            add(report, "stream", n_rows, {"task": "stream", **task})
        if not arguments.quick:
            text = str(fetch_sotu(folder / "speeches.jsonl"))
            for n_rows in _ROWS_OF_STAGE:
                add_stage(report, folder, text, n_rows)
    grow(report, "cache", few, many)
    grow(report, "stream", few, many)
    if not arguments.quick:
        grow(report, "stage", *_ROWS_OF_STAGE)
    report.targets = {name: "flat: ≤ 1.1" for name in report.ratios}
    report.finish(arguments)


def add(report: Report, what: str, n_rows: int, task: dict[str, object]) -> None:
    """Run one task in a process of its own and add its row."""
    found = run_script(sys.executable, "memory_task.py", task)
    report.rows.append((what, f"{n_rows:,}", f"{found['peak'] / 1e6:.0f}", f"{found['after_imports'] / 1e6:.0f}"))


def add_stage(report: Report, folder: Path, text: str, n_rows: int) -> None:
    """Run the cache stage in a process of its own."""
    task = {"task": "stage", "path": str(folder / f"stage-{n_rows}"), "n_rows": n_rows, "text": text}
    add(report, "stage", n_rows, task)


def grow(report: Report, what: str, few: int, many: int) -> None:
    """Add the ratio of peak memory with many rows to that with few."""
    peaks = {rows: float(peak) for name, rows, peak, _ in report.rows if name == what}
    report.ratios[f"{what}_peak_{many / few:g}x_rows"] = peaks[f"{many:,}"] / peaks[f"{few:,}"]


if __name__ == "__main__":
    main()
