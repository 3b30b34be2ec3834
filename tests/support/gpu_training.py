"""Training on a pretended GPU and on the CPU: every architecture and setting, sweeps, several layers, live rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tests.support.pretended_gpu import record
from tests.support.sharded_runs import publish_sharded
from tests.support.tiny_models import save_tiny_model
from tests.support.training_caches import publish_cache, publish_layers, random_rows, small_cache

Case = Callable[[Path, str], dict[str, float]]
"""(an empty folder, the device) → numbers that are the same on every device."""

BASE = {
    "architecture": {"kind": "topk", "k": 4},
    "d_sae": 64,
    "steps": 12,
    "batch_rows": 96,
    "lr": 1e-2,
    "log_every": 5,
    "evaluate_every": 6,
    "evaluation_rows": 64,
    "dead_after_steps": 3,
    "kernel": "dense",
    "precision": "float32",
}
GROWING = {"kind": "topk", "k": 2, "k_start": 8, "k_warmup_steps": 6}


class Killed(Exception):
    """A run that was ended from outside."""


def train_once(folder: Path, device: str, **changes: Any) -> dict[str, float]:
    """Train on a small cache and return the scores of the run."""
    cache = folder / "cache"
    if not cache.exists():
        small_cache(cache, d_in=16, d_out=12)
    result = train.run(
        TrainSettings.read(BASE, changes),
        cache=cache,
        output=folder / "transcoder",
        compute=Compute(device=device, quiet=True),
    )
    heldout = result.metrics["heldout"]
    return {"fvu": heldout["fvu"], "l0": heldout["l0"]}


def training(**changes: Any) -> Case:
    """Return a case that trains with these settings."""
    return lambda folder, device: train_once(folder, device, **changes)


def between_log_lines(kind: str) -> Case:
    """Return a case that trains without a log line, a score or a checkpoint between two of its steps.

    On a pretended GPU nothing is waited for there, rows, schedule and counts of features included.
    """

    def case(folder: Path, device: str) -> dict[str, float]:
        cache = small_cache(folder / "cache", d_in=16, d_out=12)
        rare = {"log_every": 100, "evaluate_every": 100, "steps": 12, "dead_after_steps": 50}
        settings = TrainSettings.read(BASE, {"architecture": {"kind": kind}, **rare})
        seen: list[set[str]] = []

        def look_and_step(*arguments: Any) -> Any:
            copies = [line for way, line in record.copies if not way.endswith("without a wait")]
            lines = [*(line for _, line in record.waits), *copies]
            seen.append({line for line in lines if "another thread" not in line})
            record.clear()
            return step(*arguments)

        step = TrainingRun.step
        with mock.patch.object(TrainingRun, "step", look_and_step):
            compute = Compute(device=device, quiet=True)
            done = train.run(settings, cache=cache, output=folder / "out", compute=compute)
        waited = set().union(*seen[3:])  # before each of steps 4 to 12: the whole round of the loop
        assert seen[0] or not (record.is_kept and device == "cuda"), "nothing was recorded"
        assert not waited, waited
        return {"fvu": done.metrics["heldout"]["fvu"], "steps": len(seen)}

    return case


def resuming(optimiser: str) -> Case:
    """Return a case that ends a run after 8 steps and continues it, beside a run that nothing ended."""

    def case(folder: Path, device: str) -> dict[str, float]:
        small_cache(folder / "cache", d_in=16, d_out=12)
        settings = TrainSettings.read(BASE, {"optimiser": optimiser})

        def go(name: str, kill_after: int | None) -> train.TrainResult:
            def hook(step: int, _: Transcoder) -> None:
                if step == kill_after:
                    raise Killed

            compute = Compute(device=device, quiet=True)
            output, hooks = folder / name, [(1, hook)]
            return train.run(
                settings, cache=folder / "cache", output=output, compute=compute, checkpoint_steps=3, hooks=hooks
            )

        uninterrupted = go("uninterrupted", None)
        try:
            go("killed", 8)
        except Killed:
            resumed = go("killed", None)
        files = [result.path / "weights.safetensors" for result in (uninterrupted, resumed)]
        same = files[0].read_bytes() == files[1].read_bytes()
        return {"fvu": resumed.metrics["heldout"]["fvu"], "same bytes as uninterrupted": float(same)}

    return case


def sweeping(folder: Path, device: str) -> dict[str, float]:
    """Train three runs from one read of a cache."""
    cache = small_cache(folder / "cache", d_in=16, d_out=12)
    runs = {kind: TrainSettings.read(BASE, {"architecture": {"kind": kind}}) for kind in ("topk", "relu", "gated")}
    done = sweep.run(runs, cache=cache, output=folder / "sweep", compute=Compute(device=device, quiet=True))
    return {run.name: run.metrics["heldout"]["fvu"] for run in done.runs}


def sweep_resumed(folder: Path, device: str) -> dict[str, float]:
    """End a sweep after 8 steps and continue it, beside one that nothing ended."""
    cache = small_cache(folder / "cache", d_in=16, d_out=12)
    runs = {f"k={k}": TrainSettings.read(BASE, {"architecture": {"kind": "topk", "k": k}}) for k in (2, 4)}

    def kill(step: int, _: Transcoder) -> None:
        if step == 8:
            raise Killed

    def go(name: str, *hooks: Any) -> sweep.SweepResult:
        compute = Compute(device=device, quiet=True)
        return sweep.run(
            runs, cache=cache, output=folder / name, compute=compute, checkpoint_steps=3, hooks=[(1, h) for h in hooks]
        )

    whole = go("whole")
    try:
        go("cut", kill)
    except Killed:
        cut = go("cut")
    names = [f"{run.path}/weights.safetensors" for run in whole.runs]
    same = all((whole.path / name).read_bytes() == (cut.path / name).read_bytes() for name in names)
    return {"same bytes as uninterrupted": float(same)}


def autoencoding(folder: Path, device: str) -> dict[str, float]:
    """Train an autoencoder whose input bias is its output bias."""
    splits = {name: random_rows(seed, n, 12, 12)[0] for seed, (name, n) in enumerate((("train", 640), ("heldout", 96)))}
    publish_cache(folder / "cache", {"mlp": {name: (rows, rows) for name, rows in splits.items()}})
    return train_once(folder, device, architecture={"kind": "relu", "tied_bias": True})


def across_layers(kind: str, **changes: Any) -> Case:
    """Return a case that trains one transcoder over three layers."""

    def case(folder: Path, device: str) -> dict[str, float]:
        cache = publish_layers(folder / "cache")
        settings = TrainSettings.read(BASE, {"cross_layer": True, "architecture": {"kind": kind}, **changes})
        compute = Compute(device=device, quiet=True)
        heldout = train.run(settings, cache=cache, output=folder / "out", compute=compute).metrics["heldout"]
        return {"fvu": heldout["fvu"], "l0": heldout["l0"]}

    return case


def sharing(size: int, *, features: bool = True, **changes: Any) -> Case:
    """Return a case in which ``size`` processes share the features or the rows and two go on from their checkpoint."""

    def case(folder: Path, device: str) -> dict[str, float]:
        settings = TrainSettings.read(BASE, changes)
        cache, output = folder / "cache", folder / "out"
        publish_layers(cache) if settings.cross_layer else small_cache(cache, d_in=16, d_out=12)

        def kill(step: int, _: Transcoder) -> None:
            if step == 8:
                raise Killed

        shared: dict[str, Any] = {"device": device, "cache": cache, "output": output, "checkpoint_steps": 3}
        shared["features"] = features
        try:
            publish_sharded(size, settings, hooks=[(1, kill)], **shared)
        except Killed:
            heldout = publish_sharded(2, settings, **shared).metrics["heldout"]
        return {"fvu": heldout["fvu"], "l0": heldout["l0"]}

    return case


def living(folder: Path, device: str) -> dict[str, float]:
    """Train on rows of a model as it runs."""
    model = save_tiny_model(folder / "model", "gpt2")
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "{word} river bank {word}"}}\n' for word in ("the", "a", "of", "to") * 40))
    live = LiveSettings.read(
        {"model": str(model), "dataset": str(text), "layers": "1", "context_length": 16, "buffer_rows": 512}
    )
    settings = TrainSettings.read(BASE, {"steps": 8})
    compute = Compute(device=device, quiet=True)
    made = train.run(settings, live=live, output=folder / "out", compute=compute).metrics
    return {name: made["train"][name] for name in ("loss",)}


_K4 = {"kind": "topk", "k": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {"architecture": {"kind": "relu"}},
    "relu with tanh": {"architecture": {"kind": "relu", "tanh_scale": 1.0}},
    "jumprelu to a target": {"architecture": {"kind": "jumprelu", "target_l0": 4.0}},
    "gated": {"architecture": {"kind": "gated"}},
    "matryoshka": {"architecture": {"kind": "matryoshka", "k": 4, "levels": 3}},
    "skip and input bias": {"architecture": {**_K4, "skip": True, "input_bias": True}},
    "k that falls": {"architecture": GROWING},
    "auxk": {"architecture": GROWING, "auxiliary": {"kind": "auxk", "aux_k": 4}},
    "ghost": {"architecture": GROWING, "auxiliary": {"kind": "ghost"}},
    "resampling": {"resampling": {"kind": "anthropic", "resample_every": 4, "resample_rows": 64}},
    "resampling l2": {"resampling": {"kind": "l2", "resample_every": 4, "resample_rows": 64}},
    "adamw": {"optimiser": "adamw"},
    "muon": {"optimiser": "muon"},
    "average and clipping": {"ema": 0.9, "gradient_clip": 1.0},
    "raw units": {"normalisation": "none", "reconstruction": "reference"},
    "first weights from data": {"bias_init": "geometric_median", "decoder_init": "data"},
    "ordinary rows": {"max_norm_multiple": 1.2},
    "best weights": {"keep_best": True, "snapshots": 2},
    "topk in bfloat16": {"precision": "bfloat16"},
    "jumprelu in bfloat16": {"architecture": {"kind": "jumprelu"}, "precision": "bfloat16"},
}
TRAINED: dict[str, Case] = {
    **{name: training(**changes) for name, changes in SETTINGS.items()},
    "autoencoder with a tied bias": autoencoding,
    "sweep": sweeping,
    "sweep resumed": sweep_resumed,
    **{f"across layers, {kind}": across_layers(kind) for kind in ("batch_topk", "jumprelu", "relu")},
    "rows shared, topk": sharing(4, features=False),
    "rows shared, batch_topk": sharing(3, features=False, architecture={"kind": "batch_topk", "k": 4}),
    "features shared, topk": sharing(4),
    "features shared, batch_topk": sharing(2, architecture={"kind": "batch_topk", "k": 4}),
    "features shared, across layers": sharing(
        4, cross_layer=True, architecture={"kind": "batch_topk"}, gradient_clip=0.3
    ),
    "live": living,
}
"""Cases that take long together, by name."""
