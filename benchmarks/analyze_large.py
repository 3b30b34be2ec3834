"""Claim: on a million rows all features and all tables cost little more than the encoder's product alone.

``analyze.py`` measures a tenth as many, where what is done once per feature still weighs.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from benchmarks.analyze import FULL, PASS, QUICK, WHOLE, ours, product_contender
from benchmarks.analyze_rows import planted_subject
from benchmarks.harness import measure
from benchmarks.planted_rows import plant
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.analysis.harvest.one_pass import Plan

TIMES = 10
"""The planted rows come again and again; no time depends on their being new."""


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    problem = QUICK if arguments.quick else FULL
    planted = plant(problem)
    n_rows = TIMES * problem.n_batches * problem.batch_rows
    product = "encoder product alone, bfloat16"
    report = Report(
        "analyze_large",
        "One pass over many rows, and all tables",
        f"{n_rows:,} rows of width {problem.width}, d_sae {problem.d_sae:,}, TopK with k = {problem.l0}; one core, one "
        "thread, processor time. As in analyze.py, but with the planted rows ten times over. Activations of all rows "
        "are kept.",
        ("what", "contender", "measured", "of the encoder product", "range"),
        ("torch", "numpy", "numba", "pyarrow"),
    )
    with scratch_folder(arguments) as folder:
        subject = planted_subject(problem, n_rows, planted, scratch=folder / "spool")
        floor = product_contender(product, planted, "bfloat16")
        small = planted_subject(replace(problem, n_batches=1), problem.batch_rows, planted, scratch=folder / "small")
        for contender in (floor, *ours(small, Plan(activation_rows=problem.batch_rows), folder / "warm")):
            contender.run()  # compiles loops, brings memory in
            contender.clear()
        rates = measure([floor, *ours(subject, Plan(activation_rows=n_rows), folder / "tables")], 1)
        report.add_rates(rates, [product, PASS, WHOLE], to=product, scale=1, group="rows/s, all features")
        report.ratios["pass_vs_encoder_product"] = rates.ratio(PASS, product)
        report.ratios["pass_and_tables_vs_encoder_product"] = rates.ratio(WHOLE, product)
        report.targets = {"pass_and_tables_vs_encoder_product": "≥ 0.5"}
    report.finish(arguments)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
