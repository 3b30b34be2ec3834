"""Claim: planning an epoch's true shuffle costs next to nothing, in time and memory, up to a billion rows.

The plan is the table of how many rows of each unit go to each bucket; the order inside a bucket is drawn when the
bucket is read. Compared with drawing the permutation of all rows at once, which is what it replaces.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Contender, Work, measure
from benchmarks.report import Report, parse_arguments
from tailrace.storage.shuffle import EpochPlan, default_bucket_rows

SHARD_ROWS = 262_144
SIZES = {"1M": 10**6, "60M": 6 * 10**7, "1G": 10**9}
LARGEST_PERMUTED = 6 * 10**7
"""A permutation of a billion int64 needs 8 GB."""


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    sizes = {name: n for name, n in SIZES.items() if not arguments.quick or n <= LARGEST_PERMUTED}
    rates = measure([entry for name, n in sizes.items() for entry in contenders(name, n)], 1 if arguments.quick else 5)
    report = Report(
        "shuffle_plan",
        "Planning an epoch",
        f"Units of {SHARD_ROWS:,} rows, default buckets. Plan: once an epoch. Bucket: its order and runs, once per "
        "bucket. Permutation: numpy's Generator.permutation of all row indices.",
        ("rows", "what", "seconds", "table"),
        ("numpy",),
    )
    for name, n in sizes.items():
        plan = plan_of(n, 0)
        table = f"{len(plan.unit_rows)} units × {plan.n_buckets} buckets, {plan.counts.nbytes / 1e6:.2g} MB"
        report.rows.append((f"{n:,}", "plan", f"{1 / rates.median(f'plan {name}'):.3g}", table))
        report.rows.append((f"{n:,}", "one bucket", f"{1 / rates.median(f'bucket {name}'):.3g}", ""))
        if n <= LARGEST_PERMUTED:
            report.rows.append((f"{n:,}", "permutation", f"{1 / rates.median(f'permutation {name}'):.3g}", ""))
            report.ratios[f"plan_vs_permutation_{name}"] = rates.ratio(f"plan {name}", f"permutation {name}")
        report.ratios[f"plan_nanoseconds_per_row_{name}"] = 1e9 / rates.median(f"plan {name}") / n
        report.ratios[f"bucket_nanoseconds_per_row_{name}"] = 1e9 / rates.median(f"bucket {name}") / plan.bucket_rows
    report.finish(arguments)


def plan_of(n_rows: int, epoch: int) -> EpochPlan:
    """Return the plan of an epoch over a cache of this many rows in full units."""
    units = [SHARD_ROWS] * (n_rows // SHARD_ROWS) + [n_rows % SHARD_ROWS] * bool(n_rows % SHARD_ROWS)
    return EpochPlan(0, epoch, "train", tuple(units), default_bucket_rows(SHARD_ROWS, n_rows))


def contenders(name: str, n_rows: int) -> list[Contender]:
    """Return the plan, one bucket of it, and (up to a size) the permutation of all rows; each counts as one."""
    drawn = plan_of(n_rows, 0)
    assert drawn.counts.sum() == n_rows

    def plan() -> Work:
        assert plan_of(n_rows, 1).counts.sum() == n_rows
        return Work(1)

    def bucket() -> Work:
        assert sum(run.stop - run.start for run in drawn.runs(0)) == drawn.rows_in_bucket(0)
        return Work(1)

    def permutation() -> Work:
        assert len(np.random.Generator(np.random.Philox(0)).permutation(n_rows)) == n_rows
        return Work(1)

    found = [Contender(f"plan {name}", plan), Contender(f"bucket {name}", bucket)]
    return [*found, Contender(f"permutation {name}", permutation)] if n_rows <= LARGEST_PERMUTED else found


if __name__ == "__main__":
    main()
