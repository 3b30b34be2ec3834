"""The demo: text to feature tables on a small real language model, with one setting to choose the model.

Everything lies below one directory and every step continues or is skipped if it was done before, as the stages do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import AnalyzeResult
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache import verify
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.samples.bundled_models import DemoModel, bundled_model
from tailrace.pipeline.samples.smollm2 import fetch_smollm2
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.tables import read_table
from tailrace.training.loop.settings import TrainSettings

Say = Callable[[str], None]

_SHORTEST_WORD = 4
_FAMILY_SHARE = (0.2, 0.8)
"""Share of a feature's examples on its top token that tells a family of tokens from a single one."""
_READABLE_FREQUENCY = 0.02


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
    compute: Compute = Compute(),
    say: Say = lambda _: None,
) -> DemoResult:
    """Cache, verify, train and analyze on presidents' speeches. ``say`` is told what happens next.

    Raises ActionableError if the model or the text cannot be downloaded, and what the stages raise.
    """
    recipe = RECIPES[model]
    layer = recipe.layer if layer is None else layer
    folder = output / f"{model}-layer{layer}"
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
    cached = cache.run(settings, output=folder / "cache", compute=compute)
    say("2/5 verify: every byte, and pairs against the model run again")
    _verify(cached.path, compute)
    say("3/5 train: a BatchTopK transcoder from the cache; the language model is not needed any more")
    training = TrainSettings.model_validate(
        {
            "architecture": {"kind": "batch_topk", "k": recipe.k},
            "d_sae": recipe.d_sae,
            "steps": steps or recipe.steps,
            "auxiliary": {"kind": "auxk"},
            "dead_after_steps": 50,  # so short a run would be over before the default calls a feature dead
        }
    )
    trained = train.run(training, cache=cached.path, output=folder / "transcoder", compute=compute)
    say("4/5 analyze: features and examples over held-out speeches, as Parquet")
    tables = analyze.run(
        AnalyzeSettings(),
        cache=cached.path,
        transcoder=trained.path,
        output=folder / "tables",
        compute=compute,
    )
    say("5/5 dashboard: a page for every feature, which a browser opens from disk")
    site = dashboard.run(DashboardSettings(), tables=tables.path, output=folder / "dashboard", quiet=compute.quiet)
    return DemoResult(cached.path, trained.path, tables, site.page)


def _fetch_model(model: DemoModel, output: Path) -> Path:
    return bundled_model("tiny-lm") if model == "tiny" else fetch_smollm2(output / "smollm2-135m")


def _verify(path: Path, compute: Compute) -> None:
    problems = verify.check_bytes(path)
    failed = [report for report in verify.check_pairs(path, n_contexts=8, compute=compute) if not report.passed]
    problems += [
        f"{report.site}/{report.side} differs from the model by {report.relative_error:.1e}" for report in failed
    ]
    if problems:
        raise ArtifactCorrupt("; ".join(problems))


class FeatureLine(NamedTuple):
    """A feature at a glance."""

    feature: int
    frequency: float
    max: float
    top_tokens: list[str]
    """Distinct tokens of its examples, strongest first."""
    example: str
    """The text around its strongest example, whose token stands between » and «."""


def summary(tables: Path, n_features: int = 8, n_tokens: int = 5) -> list[FeatureLine]:
    """Return a few features that are easy to read, no two with the same top token.

    Sparse features on a family of words come first, then those on a single token, dense ones last; features with half
    or fewer of the examples that others have are left out.
    """
    columns = ["feature", "frequency", "max", "top_token", "top_token_id", "top_token_share"]
    features = read_table(tables / "features.parquet", columns, pc.field("n_active") > 0).to_pylist()
    shown = ["feature", "token", "position", "window_start", "window_tokens"]
    is_top = pc.field("kind") == "top"
    strongest = read_table(tables / "examples.parquet", ["feature"], is_top)
    counted = strongest["feature"].value_counts().to_pylist()
    n_examples = {entry["values"]: entry["counts"] for entry in counted}
    enough = max(n_examples.values(), default=0) / 2
    readable = [row for row in features if n_examples[row["feature"]] > enough]
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(readable, key=_readability):
        best.setdefault(row["top_token_id"], row)
    chosen = list(best.values())[:n_features]
    is_chosen = pc.field("feature").isin([row["feature"] for row in chosen])
    examples = read_table(tables / "examples.parquet", shown, is_chosen & is_top).to_pylist()
    return [_line(row, [own for own in examples if own["feature"] == row["feature"]], n_tokens) for row in chosen]


def _readability(feature: dict[str, Any]) -> tuple[bool, bool, bool, float, int]:
    """Order features by how well a few examples show what they are about."""
    is_word = feature["top_token"].strip().isalpha() and len(feature["top_token"].strip()) >= _SHORTEST_WORD
    is_family = _FAMILY_SHARE[0] <= feature["top_token_share"] <= _FAMILY_SHARE[1]
    is_frequent = feature["frequency"] > _READABLE_FREQUENCY
    return is_frequent, not is_word, not is_family, -feature["max"], feature["feature"]


def _line(feature: dict[str, Any], examples: list[dict[str, Any]], n_tokens: int) -> FeatureLine:
    tokens = list(dict.fromkeys(example["token"] for example in examples))[:n_tokens]
    window, at = examples[0]["window_tokens"], examples[0]["position"] - examples[0]["window_start"]
    text = "".join(window[:at]) + "»" + window[at] + "«" + "".join(window[at + 1 :])
    return FeatureLine(feature["feature"], feature["frequency"], feature["max"], tokens, text)
