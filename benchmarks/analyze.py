"""Claim: all features of a transcoder are analysed in one pass at half the speed of the encoder's product or more.

Beside the product alone, the original's method (a full forward pass for each feature) and SAEDashboard's generation,
both measured for a few features and extrapolated to all. Then memory, and how long one feature's rows take to read.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from benchmarks.analyze_reference import BATCH_ROWS, ReferenceScores
from benchmarks.analyze_rows import planted_subject
from benchmarks.harness import Contender, Rates, Work, measure
from benchmarks.peers import environment, run_script
from benchmarks.planted_rows import Planted, Problem, plant, save
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.analysis.harvest.one_pass import Plan, Subject, gather
from tailrace.analysis.harvest.table import accumulators, write_tables
from tailrace.analysis.tables import TABLES
from tailrace.storage.tables import read_table
from tailrace.training.kernels.adaptive import resolve_precision

QUICK = Problem(256, 2048, 32, n_batches=4)
FULL = Problem(768, 24_576, 64, n_batches=24)
SAEDASHBOARD = ["sae-dashboard==0.8.0", "pyarrow<20"]
"""It wants numpy 1, which newer releases of pyarrow do not load beside."""
FEATURES_OF_SAEDASHBOARD = 64
REAL_TABLES = Path(__file__).parent.parent / "demo" / "smollm2-layer3" / "tables"
PASS, WHOLE, REFERENCE = "our pass", "our pass and tables", "the original's method, one feature"


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    problem, rounds = (QUICK, 1) if arguments.quick else (FULL, 3)
    planted = plant(problem)
    n_rows = problem.n_batches * problem.batch_rows
    precision = resolve_precision("auto", torch.device("cpu"))
    product = f"encoder product alone, {precision}"
    report = start_report(problem, n_rows, rounds)
    with scratch_folder(arguments) as folder:
        subject = planted_subject(problem, n_rows, planted, scratch=folder / "spool")
        contenders = [
            product_contender(product, planted, precision),
            product_contender("encoder product alone, float32", planted, "float32"),
            *ours(subject, Plan(activation_rows=n_rows), folder / "tables"),
            reference(planted),
        ]
        for contender in contenders:
            contender.run()  # compiles loops, brings memory in
        rates = measure(contenders, rounds)
        names = list(dict.fromkeys([product, "encoder product alone, float32", PASS, WHOLE]))
        report.add_rates(rates, names, to=product, scale=1, group="rows/s, all features")
        add_extrapolated(report, rates, problem)
        report.ratios["pass_vs_encoder_product"] = rates.ratio(PASS, product)
        report.ratios["pass_and_tables_vs_encoder_product"] = rates.ratio(WHOLE, product)
        add_saedashboard(report, rates, planted, problem, folder, arguments.quick)
        add_memory(report, problem, n_rows, folder)
        add_queries(report, "queries, these tables", folder / "tables")
    if (REAL_TABLES / "activations").exists():
        add_queries(report, "queries, SmolLM2's tables", REAL_TABLES)
    report.targets = {"pass_vs_encoder_product": "≥ 0.5", "peak_4x_rows": "flat: ≤ 1.1", "query_ms": "< 50"}
    report.finish(arguments)


def start_report(problem: Problem, n_rows: int, rounds: int) -> Report:
    """Return the report without results."""
    return Report(
        "analyze",
        "One pass over all features",
        f"{n_rows:,} rows of width {problem.width}, d_sae {problem.d_sae:,}, TopK with k = {problem.l0}; {rounds} "
        "rounds, one core, one thread, one process. Rows are made up (a planted dictionary with log-normal firing "
        "frequencies) and lie in memory as bfloat16. The floor is the encoder's matrix product in the precision in "
        "which this processor is fastest, 4,096 rows at a time, conversion of inputs included, output left where it "
        "falls. Our pass counts everything that every table needs and puts all pairs aside; with tables, it sorts them "
        "and writes every file (those of the language model's weights excepted). The original's method is one full "
        "forward pass per feature, measured for one feature on 16,384 rows and multiplied by d_sae; its own runs of "
        "the language model are left out. SAEDashboard is measured for 64 features, as an autoencoder on a model of "
        "one layer, and multiplied by d_sae / 64. Rates are of the process's processor time (user and system), except "
        "that of queries.",
        ("what", "contender", "measured", "of the encoder product", "range"),
        ("torch", "numpy", "numba", "pyarrow", "duckdb"),
    )


def product_contender(name: str, planted: Planted, precision: str) -> Contender:
    """Return the encoder's product over two batches."""
    dtype = getattr(torch, precision)
    encoder, bias = planted.encoder.to(dtype), torch.zeros(len(planted.encoder), dtype=dtype)

    def multiply() -> int:
        with torch.no_grad():
            for batch in planted.inputs[:2]:
                F.linear(batch.to(dtype), encoder, bias)
        return 2 * planted.inputs.shape[1]

    return Contender(name, partial(work_of, multiply))


def ours(subject: Subject, plan: Plan, folder: Path) -> list[Contender]:
    """Return our pass, and our pass with the tables written."""

    def count() -> int:
        gather(subject, plan, accumulators(TABLES))
        return subject.split.n_rows

    def write() -> int:
        harvest = gather(subject, plan, accumulators(TABLES))
        write_tables(TABLES, harvest, subject, plan, folder)
        return subject.split.n_rows

    def clear() -> None:
        if subject.scratch is not None:
            shutil.rmtree(subject.scratch, ignore_errors=True)

    return [Contender(name, partial(work_of, run), clear=clear) for name, run in ((PASS, count), (WHOLE, write))]


def reference(planted: Planted) -> Contender:
    """Return the original's method for one feature."""
    scores = ReferenceScores(planted.encoder, planted.decoder, planted.threshold)
    rows = planted.inputs.reshape(-1, planted.inputs.shape[-1])[: 2 * BATCH_ROWS]

    def score() -> int:
        scores.scores(rows, 0)
        return len(rows)

    return Contender(REFERENCE, partial(work_of, score))


def work_of(run: Callable[[], int]) -> Work:
    """Return the rows of a run and the processor time it took: other work of the machine is no part of it."""
    start = time.process_time()
    n_rows = run()
    return Work(n_rows, time.process_time() - start)


def add_extrapolated(report: Report, rates: Rates, problem: Problem) -> None:
    """Add the original's method, extrapolated to all features."""
    for_all = rates.median(REFERENCE) / problem.d_sae
    report.rows.append(("rows/s, all features", f"{REFERENCE} × {problem.d_sae:,}", f"{for_all:.3g}", "–", "–"))
    report.ratios["pass_vs_original_extrapolated"] = rates.ratio(PASS, REFERENCE) * problem.d_sae
    report.ratios["pass_and_tables_vs_original_extrapolated"] = rates.ratio(WHOLE, REFERENCE) * problem.d_sae


def add_saedashboard(
    report: Report, rates: Rates, planted: Planted, problem: Problem, folder: Path, is_quick: bool
) -> None:
    """Add SAEDashboard's generation, if its environment can be made and run; say why where it cannot."""
    save(planted, problem, folder / "planted")
    n_rows = 8192 if is_quick else 65_536
    task = {"folder": str(folder / "planted"), "threshold": planted.threshold, "n_rows": n_rows}
    try:
        python = environment("saedashboard", SAEDASHBOARD, without=["torchvision"])
        found = run_script(python, "analyze_saedashboard.py", {**task, "n_features": FEATURES_OF_SAEDASHBOARD})
    except Exception as error:
        print(f"SAEDashboard cannot be run here: {error}", file=sys.stderr)
        report.rows.append(
            ("rows/s, all features", f"SAEDashboard: cannot be run here ({type(error).__name__})", "–", "–", "–")
        )
        return
    for_all = n_rows / (found["seconds"] * problem.d_sae / FEATURES_OF_SAEDASHBOARD)
    report.extra_versions["SAEDashboard"] = found["version"]
    report.rows.append(("rows/s, all features", "SAEDashboard, extrapolated", f"{for_all:.3g}", "–", "–"))
    report.ratios["pass_and_tables_vs_saedashboard_extrapolated"] = rates.median(WHOLE) / for_all


def add_memory(report: Report, problem: Problem, n_rows: int, folder: Path) -> None:
    """Add peak memory of the pass and of the tables, with as many rows and with four times as many."""
    peaks = []
    for rows in (n_rows, 4 * n_rows):
        task: dict[str, Any] = {"problem": asdict(problem), "n_rows": rows, "folder": str(folder)}
        found = run_script(sys.executable, "analyze_task.py", task)
        peaks.append(found["peak"])
        for part in ("pass", "peak"):
            name = {"pass": "the pass", "peak": "the pass, then tables"}[part]
            report.rows.append(
                ("peak MB above weights and rows", f"{name}, {rows:,} rows", f"{found[part] / 1e6:.0f}", "–", "–")
            )
    report.ratios["peak_4x_rows"] = peaks[1] / peaks[0]


def add_queries(report: Report, group: str, tables: Path) -> None:
    """Add how long one feature's activations and examples take to read; the files are in the system's cache."""
    feature = middling_feature(tables)
    files = sorted((tables / "activations").glob("*.parquet"))
    own = next(file for file in files if int(file.stem.split("-")[2]) >= feature)
    is_own = pc.field("feature") == feature
    views = "', '".join(map(str, files))
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"CREATE VIEW activations AS SELECT * FROM read_parquet(['{views}'])")
        connection.execute(f"CREATE VIEW examples AS SELECT * FROM read_parquet('{tables / 'examples.parquet'}')")
        ways: dict[str, Callable[[], object]] = {
            "activations, its file": lambda: read_table(own, where=is_own),
            "activations, in SQL": lambda: connection.sql(
                f"SELECT row, activation FROM activations WHERE feature = {feature}"
            ).to_arrow_table(),
            "examples, its file": lambda: read_table(tables / "examples.parquet", where=is_own),
            "examples, in SQL": lambda: connection.sql(
                f"SELECT * FROM examples WHERE feature = {feature}"
            ).to_arrow_table(),
        }
        slowest = 0.0
        for name, ask in ways.items():
            ask()
            milliseconds = [1000 * timed(ask) for _ in range(20)]
            slowest = max(slowest, statistics.median(milliseconds))
            spread = f"{min(milliseconds):.1f}–{max(milliseconds):.1f}"
            report.rows.append((group, name, f"{statistics.median(milliseconds):.1f} ms", "–", spread))
    report.ratios["query_ms"] = max(slowest, report.ratios.get("query_ms", 0.0))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def middling_feature(tables: Path) -> int:
    """Return the live feature of middling frequency."""
    found = read_table(tables / "features.parquet", ["feature", "n_active"], pc.field("n_active") > 0)
    ordered = found.sort_by("n_active")["feature"].to_pylist()
    return int(ordered[len(ordered) // 2])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
