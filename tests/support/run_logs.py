"""Logs of runs written by hand, as training writes them: no run has to be trained for a test that reads them."""

from __future__ import annotations

import json
from pathlib import Path


def write_run(path: Path, *, n_lines: int, fvu: float | None = 0.5, linear: float | None = None) -> None:
    """Write a run of ten steps of 64 rows between lines; its loss is 1, 1/2, 1/3, …, its last held-out FVU ``fvu``."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / "metrics.jsonl").open("w") as metrics, (path / "timing.jsonl").open("w") as timing:
        for line in range(1, n_lines + 1):
            at = {"step": 10 * line, "rows": 640 * line}
            train = {
                "loss": 1 / line,
                "fvu": None,
                "l0": 3,
                "dead_fraction": 0.0,
                "lr": 1e-3,
                "losses/mse_loss": 1 / line,
            }
            metrics.write(json.dumps({**at, "split": "train", **train}) + "\n")
            score = {"n_rows": 40, "fvu": fvu, "l0": 3.5, "dead_fraction": 0.125, "log10_frequency": {"counts": [1]}}
            metrics.write(json.dumps({**at, "split": "heldout", **score}) + "\n")
            seconds = {"seconds": 2.0 * line, "rows_per_second": 320.0, "n_steps": 10 * n_lines}
            timing.write(json.dumps({"step": 10 * line, **seconds}) + "\n")
    if linear is not None:
        (path / "baselines.json").write_text(json.dumps({"mean_fvu": 1.0, "linear_fvu": linear}))
