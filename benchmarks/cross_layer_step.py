"""Claim: on a CPU a cross-layer transcoder's step at active pairs is several times as fast as its dense step.

One core; random rows, BatchTopK; the steps of one transcoder a layer, with as many features each, beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.harness import Contender, measure, processor_time
from benchmarks.report import Report, parse_arguments
from tailrace.storage.cache_format import Site
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.choices import KernelKind
from tailrace.training.loop.build import build_cross_layer_run, build_run
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch, SiteBatches

WIDTH, K = 576, 16
SPARSE, DENSE, APART = "cross-layer, sparse", "cross-layer, dense bfloat16", "one transcoder a layer, sparse"
Step = Callable[[], None]


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    n_layers, n_features, n_rows, rounds = (3, 256, 512, 2) if arguments.quick else (6, 1024, 2048, 5)
    sites = [Site(f"layer{one}", f"in{one}", f"out{one}", WIDTH, WIDTH, "float32") for one in range(n_layers)]
    rows = make_rows(sites, n_rows)
    steps: dict[str, Step] = {
        SPARSE: cross_layer(sites, rows, n_features, "sparse"),
        DENSE: cross_layer(sites, rows, n_features, "dense"),
        APART: apart(sites, rows, n_features),
    }
    rates = measure([Contender(name, partial(processor_time, step)) for name, step in steps.items()], rounds)
    report = Report(
        "cross_layer_step",
        "A step of a cross-layer transcoder",
        f"{n_layers} layers of width {WIDTH}, {n_features:,} features each, k = {K}, {n_rows:,} random rows; one core, "
        f"one thread, whole steps with the optimiser, {rounds} rounds in an order drawn anew; processor time. "
        "Screening products and the dense step are in bfloat16; the sparse step is exact in float32.",
        ("step", "ms", "of the dense step"),
        ("torch", "numpy", "numba"),
    )
    for name in steps:
        share = f"{rates.ratio(DENSE, name):.2f} ({rates.spread(DENSE, name)})"
        report.rows.append((name, f"{1e3 / rates.median(name):.0f}", share))
    report.ratios["sparse_vs_dense"] = rates.ratio(SPARSE, DENSE)
    report.ratios["sparse_vs_one_transcoder_a_layer"] = rates.ratio(SPARSE, APART)
    report.finish(arguments)


def make_rows(sites: list[Site], n_rows: int) -> SiteBatches:
    """Return a batch of standard normal rows at every site."""
    generator = torch.Generator().manual_seed(0)
    return {site.name: Batch(*(torch.randn(n_rows, WIDTH, generator=generator) for _ in range(2))) for site in sites}


def statistics_of(batch: Batch) -> dict[Side, SiteStatistics]:
    """Return a batch's statistics by side."""
    found: dict[Side, SiteStatistics] = {"in": SiteStatistics(WIDTH), "out": SiteStatistics(WIDTH)}
    for side, rows in zip(found.values(), batch, strict=True):
        side.add(np.asarray(rows))
    return found


def settings(n_features: int, kernel: KernelKind, *, across: bool) -> TrainSettings:
    """Return the settings of one transcoder."""
    return TrainSettings.read(
        {
            "architecture": {"kind": "batch_topk", "k": K},
            "cross_layer": across,
            "d_sae": n_features,
            "lr": 1e-6,
            "kernel": kernel,
        }
    )


def cross_layer(sites: list[Site], rows: SiteBatches, n_features: int, kernel: KernelKind) -> Step:
    """Return a step over all layers; it has been taken twice."""
    run = build_cross_layer_run(
        settings(n_features, kernel, across=True),
        sites,
        {name: statistics_of(batch) for name, batch in rows.items()},
        n_steps=10**6,
        device=torch.device("cpu"),
        precision="bfloat16",
    )
    return taken_twice(lambda: run.step(rows))


def apart(sites: list[Site], rows: SiteBatches, n_features: int) -> Step:
    """Return a step of a transcoder for every layer; it has been taken twice."""
    runs = [
        build_run(
            settings(n_features, "sparse", across=False),
            site,
            statistics_of(rows[site.name]),
            n_steps=10**6,
            device=torch.device("cpu"),
            precision="bfloat16",
        )
        for site in sites
    ]

    def step() -> None:
        for run in runs:
            run.step(rows)

    return taken_twice(step)


def taken_twice(step: Step) -> Step:
    """Return ``step`` after two calls: memory is there, and what is looked for is known."""
    step()
    step()
    return step


if __name__ == "__main__":
    main()
