"""Claim: where half the features die, aux-k leaves fewer dead and explains more of real activations.

Every way to revive features, on the rows that ``make demo`` caches, from the same start, in the same order, at a
learning rate that kills. One seed and short runs: enough to see what each does, not to rank the close ones. A quick run
takes a tenth of the steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report, parse_arguments
from tailrace.storage.activation_cache import open_cache
from tailrace.training.loop.build import build_run
from tailrace.training.loop.evaluate import HeldoutScore, evaluate
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import CacheBatches, iter_once
from tailrace.training.rows.row_source import CacheRows

CACHE = Path("demo/tiny-layer2/cache")
BATCH_ROWS = 1024
SETTINGS: dict[str, Any] = {
    "architecture": {"kind": "topk", "k": 8},
    "d_sae": 2048,
    "lr": 1e-2,
    "encoder_scale": 1.0,
    "dead_after_steps": 40,
}
RESAMPLING = {"resample_every": 100, "resample_ramp_steps": 20, "resample_rows": 16_384}
METHODS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "auxk": {"auxiliary": {"kind": "auxk"}},
    "ghost, scalar": {"auxiliary": {"kind": "ghost"}},
    "ghost, elementwise": {"auxiliary": {"kind": "ghost", "ghost_rescale": "elementwise"}},
    "anthropic": {"resampling": {"kind": "anthropic", **RESAMPLING}},
    "anthropic, scale 1": {"resampling": {"kind": "anthropic", "resample_scale": 1.0, **RESAMPLING}},
    "l2": {"resampling": {"kind": "l2", **RESAMPLING}},
}


def train_once(settings: TrainSettings, n_steps: int) -> tuple[HeldoutScore, int]:
    """Return the held-out score after ``n_steps`` and how many features were resampled."""
    cache = open_cache(CACHE)
    (site,) = cache.sites.values()
    split = cache.split("train")
    with CacheBatches(split, [site], batch_rows=BATCH_ROWS, seed=0) as stream:
        run = build_run(
            settings,
            site,
            {side: split.statistics(site.name, side) for side in site.sides},
            n_steps=n_steps,
            device=torch.device("cpu"),
            precision="float32",
            row_source=CacheRows(split, site, seed=settings.seed),
        )
        for _ in range(n_steps):
            run.step(stream.next_batch())
    score = evaluate(run.predict, iter_once(cache.split("heldout"), site, batch_rows=BATCH_ROWS))
    return score, int(run.latest_extras.get("resampled_features", 0))


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if not CACHE.exists():
        sys.exit(f"{CACHE} is not there: run `make demo` first, and this from the checkout's top folder")
    n_steps = 50 if arguments.quick else 500
    report = Report(
        "dead_features",
        "Reviving dead features",
        f"Layer 2 of the demo's model, {n_steps} steps of {BATCH_ROWS:,} rows, TopK with k = 8 of 2,048 features, "
        "learning rate 1e-2, one seed. Scores on all held-out rows.",
        ("method", "FVU", "dead features", "resampled"),
        ("torch",),
        targets={"auxk_fvu_vs_nothing": "< 1", "auxk_dead_vs_nothing": "< 1"},
    )
    scores: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        score, n_resampled = train_once(TrainSettings.read(SETTINGS, method), n_steps)
        scores[name] = score.record()
        cells = (f"{scores[name]['fvu']:.4f}", f"{100 * scores[name]['dead_fraction']:.1f}%", f"{n_resampled:,}")
        report.rows.append((name, *cells))
    for measure, key in (("fvu", "fvu"), ("dead", "dead_fraction")):
        report.ratios[f"auxk_{measure}_vs_nothing"] = scores["auxk"][key] / scores["nothing"][key]
    report.finish(arguments)


if __name__ == "__main__":
    main()
