"""Claim: the sparse step costs little more than its one matrix product, until a few per cent of features fire.

One core; TopK with k from 16 to 2048, so that density is set; the dense step of the same transcoder beside it, and the
encoder's product alone as the floor. Where the two steps cross is where `tailrace.training.kernels.adaptive` switches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Contender, measure, processor_time
from benchmarks.planted_rows import Planted, Problem, plant
from benchmarks.report import Report, parse_arguments
from benchmarks.train_step_ours import statistics_of
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import TopK
from tailrace.training.choices import KernelKind
from tailrace.training.kernels.kernel import DENSE_ABOVE, SPARSE_BELOW, Precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch

L0S = (16, 32, 64, 128, 256, 512, 1024, 2048)
Step = Callable[[], None]


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    sizes = ((256, 2048, 1024, 1),) if arguments.quick else ((768, 6144, 4096, 3), (768, 24_576, 4096, 3))
    report = Report(
        "step_density",
        "A step over L0",
        "TopK, one core, one thread, whole steps with the optimiser, contenders in an order drawn anew every round; "
        "processor time. Rows and first weights: benchmarks/planted_rows.py. The floor is the product of a batch with "
        "the encoder in bfloat16. Sparse steps screen in bfloat16 and are exact; the dense step is exact in float32 "
        f"only. Training takes the sparse step below {SPARSE_BELOW:.0%} active, the dense one above {DENSE_ABOVE:.0%}.",
        ("d_sae", "L0", "active", "sparse ms", "dense bfloat16 ms", "dense float32 ms", "floor ms", "sparse ÷ floor"),
        ("torch", "numpy", "numba"),
    )
    for width, d_sae, batch_rows, rounds in sizes:
        planted = plant(Problem(width, d_sae, 64, batch_rows=batch_rows, n_batches=1))
        for l0 in L0S:
            if l0 * 8 <= d_sae:
                add_l0(report, planted, l0, rounds)
    report.finish(arguments)


def add_l0(report: Report, planted: Planted, l0: int, rounds: int) -> None:
    """Measure one density."""
    d_sae = len(planted.encoder)
    steps: dict[str, Step] = {
        "sparse": stepper(planted, l0, "sparse", "bfloat16"),
        "dense bfloat16": stepper(planted, l0, "dense", "bfloat16"),
        "dense float32": stepper(planted, l0, "dense", "float32"),
        "floor": floor(planted),
    }
    contenders = [Contender(name, partial(processor_time, step)) for name, step in steps.items()]
    rates = measure(contenders, rounds)
    milliseconds = {name: 1e3 / rates.median(name) for name in steps}
    to_floor = 1 / rates.ratio("sparse", "floor")
    cells = (f"{milliseconds[name]:.0f}" for name in ("sparse", "dense bfloat16", "dense float32", "floor"))
    report.rows.append((f"{d_sae:,}", str(l0), f"{l0 / d_sae:.2%}", *cells, f"{to_floor:.2f}"))
    report.ratios[f"sparse_vs_dense_bfloat16_{d_sae}_l0_{l0}"] = rates.ratio("sparse", "dense bfloat16")
    if l0 == 64:
        report.ratios[f"sparse_over_floor_{d_sae}_l0_64"] = to_floor
        report.targets[f"sparse_over_floor_{d_sae}_l0_64"] = "≤ 2 (width 768)"


def stepper(planted: Planted, k: int, kernel: KernelKind, precision: Precision) -> Step:
    """Return a step of a run on the planted batch; it has been taken twice."""
    d_sae, width = planted.encoder.shape
    run: TrainingRun = build_run(
        TrainSettings(architecture=TopK(k=k), d_sae=d_sae, lr=1e-6, normalisation="none", kernel=kernel),
        Site("planted", "in", "out", width, width, "float32"),
        {"in": statistics_of(planted.inputs), "out": statistics_of(planted.outputs)},
        n_steps=10**6,
        device=torch.device("cpu"),
        precision=precision,
    )
    with torch.no_grad():
        run.transcoder.W_enc.copy_(planted.encoder)
        run.transcoder.W_dec.copy_(planted.decoder)
    batches = {"planted": Batch(planted.inputs[0], planted.outputs[0])}
    run.step(batches)
    run.step(batches)
    return lambda: run.step(batches)


def floor(planted: Planted) -> Step:
    """Return the encoder's product alone, in chunks as the sparse step takes it, into memory used again."""
    rows, weights = planted.inputs[0].bfloat16(), planted.encoder.bfloat16()
    n_chunk = max(32, (12 << 20) // (2 * len(weights)) // 32 * 32)
    out = torch.empty(n_chunk, len(weights), dtype=torch.bfloat16)

    def product() -> None:
        for start in range(0, len(rows), n_chunk):
            piece = rows[start : start + n_chunk]
            torch.mm(piece, weights.T, out=out[: len(piece)])

    return product


if __name__ == "__main__":
    main()
