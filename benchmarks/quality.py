"""Claim: on a real model, our transcoders and SAEs are as good as a peer's at the same L0, rows and steps.

Three comparisons on one layer of SmolLM2-135M, all on the same cached rows in the same order:

* every architecture as a transcoder: held-out FVU over L0;
* TopK and BatchTopK SAEs of the MLP's output beside dictionary_learning's, over three seeds, the learning rate of each
  side chosen by its own small search;
* with ``--losses``, the language model's loss with each transcoder, and each SAE of the output, in place.

Held-out FVU at a given L0 is interpolated in log L0 between a run's neighbours of the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_peers import PeerRecipe, peer_predictor, train_dictionary_learning, write_rows
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.transcoder import save_weights
from tailrace.training.kernels.adaptive import resolve_precision
from tailrace.training.loop.build import build_run
from tailrace.training.loop.evaluate import HeldoutScore, evaluate
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch, CacheBatches, iter_once

L0S = (16, 32, 64, 128)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Point:
    """One trained dictionary."""

    group: str
    """transcoder or sae."""
    kind: str
    seed: int
    lr: float
    setting: str
    l0: float
    fvu: float
    dead_fraction: float


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is trained, and where it is noted."""

    group: str
    architecture: dict[str, Any]
    lr: float
    seed: int = 0

    @property
    def kind(self) -> str:
        """The architecture's kind."""
        return str(self.architecture["kind"])

    @property
    def name(self) -> str:
        """A file name."""
        values = "-".join(f"{key}{value}" for key, value in self.architecture.items() if key != "kind")
        return f"{self.group}-{self.kind}-{values}-lr{self.lr:g}-seed{self.seed}"


def transcoder_recipes(lr: float) -> list[Recipe]:
    """Return every architecture over settings that give L0 from about 16 to 128."""
    penalised = {
        "relu": [{"l1": l1} for l1 in (0.02, 0.05, 0.1, 0.2, 0.4)],
        "gated": [{"l1": l1} for l1 in (0.05, 0.1, 0.2, 0.4, 0.8)],
    }
    chosen = {kind: [{"k": k} for k in L0S] for kind in ("topk", "batch_topk", "matryoshka")}
    targeted = {
        "jumprelu": [{"target_l0": float(l0), "l0": 1.0, "bandwidth": 0.02, "initial_threshold": 0.02} for l0 in L0S]
    }
    return [
        Recipe("transcoder", {"kind": kind, **settings}, lr)
        for kind, found in {**chosen, **targeted, **penalised}.items()
        for settings in found
    ]


def sae_recipes(lr: float) -> list[Recipe]:
    """Return the SAEs of the MLP's output that are compared with a peer's."""
    return [
        Recipe("sae", {"kind": kind, "k": k}, lr, seed)
        for kind in ("topk", "batch_topk")
        for k in L0S
        for seed in range(3)
    ]


class Bench:
    """One cache and one length of training, for every dictionary."""

    def __init__(
        self, cache: ActivationCache, site: str, folder: Path, *, d_sae: int, batch_rows: int, steps: int
    ) -> None:
        self.cache, self.site = cache, cache.sites[site]
        self.d_sae, self.batch_rows, self.steps, self.folder = d_sae, batch_rows, steps, folder
        folder.mkdir(parents=True, exist_ok=True)
        split = cache.split("train")
        self._sides: dict[Side, SiteStatistics] = {side: split.statistics(site, side) for side in self.site.sides}
        self._heldout = list(iter_once(cache.split("heldout"), self.site, batch_rows=2048))

    def points(self, recipes: Sequence[Recipe]) -> list[Point]:
        """Return the points of recipes; those that were not trained before are trained side by side."""
        missing = [recipe for recipe in recipes if not self._note(recipe).exists()]
        for start in range(0, len(missing), 12):
            self._train(missing[start : start + 12])
        return [Point(**json.loads(self._note(recipe).read_text())) for recipe in recipes]

    def _note(self, recipe: Recipe) -> Path:
        return self.folder / f"{recipe.name}.json"

    def _train(self, recipes: Sequence[Recipe]) -> None:
        runs = [self._build(recipe) for recipe in recipes]
        with CacheBatches(self.cache.split("train"), [self.site], batch_rows=self.batch_rows, seed=0) as stream:
            for _ in range(self.steps):
                batch = stream.next_batch()[self.site.name]
                both = {"transcoder": batch, "sae": Batch(batch.outputs, batch.outputs)}
                for run in runs:
                    run.step(both)
        for recipe, run in zip(recipes, runs, strict=True):
            save_weights(self.folder / f"{recipe.name}.safetensors", run.folded())
            note_point(self._note(recipe), recipe, evaluate(run.predict, self.heldout(recipe.group)))

    def _build(self, recipe: Recipe) -> TrainingRun:
        site, sides = self.site, dict(self._sides)
        if recipe.group == "sae":
            site = Site("sae", site.hook_out, site.hook_out, site.d_out, site.d_out, site.dtype)
            sides = {"in": self._sides["out"]}
        run = build_run(
            TrainSettings.model_validate(
                {"architecture": recipe.architecture, "d_sae": self.d_sae, "lr": recipe.lr, "seed": recipe.seed}
            ),
            site,
            sides,
            n_steps=self.steps,
            device=CPU,
            precision=resolve_precision("auto", CPU),
            name=recipe.name,
        )
        run.site = recipe.group
        return run

    def heldout(self, group: str) -> Iterable[Batch]:
        """Yield all held-out rows."""
        for batch in self._heldout:
            yield batch if group == "transcoder" else Batch(batch.outputs, batch.outputs)


class Peer:
    """dictionary_learning's SAEs of the output, on the same rows in the same order."""

    def __init__(self, bench: Bench, threads: int) -> None:
        self._bench, self._threads = bench, threads
        self._rows = bench.folder / "rows.npy"
        if not self._rows.exists():
            with CacheBatches(bench.cache.split("train"), [bench.site], batch_rows=bench.batch_rows, seed=0) as stream:
                batches = (stream.next_batch()[bench.site.name].outputs for _ in range(bench.steps))
                write_rows(self._rows, batches, bench.steps * bench.batch_rows)

    def points(self, recipes: Sequence[Recipe]) -> list[Point]:
        """Return the points of recipes; those that were not trained before are trained side by side."""
        missing = [recipe for recipe in recipes if not self._note(recipe).exists()]
        for start in range(0, len(missing), 12):
            self._train(missing[start : start + 12])
        return [Point(**json.loads(self._note(recipe).read_text())) for recipe in recipes]

    def _note(self, recipe: Recipe) -> Path:
        return self._bench.folder / f"peer-{recipe.name}.json"

    def _train(self, recipes: Sequence[Recipe]) -> None:
        bench = self._bench
        paths = {recipe: self._note(recipe).with_suffix(".safetensors") for recipe in recipes}
        train_dictionary_learning(
            self._rows,
            [
                PeerRecipe(recipe.kind, recipe.architecture["k"], recipe.lr, recipe.seed, str(path))
                for recipe, path in paths.items()
                if not path.exists()
            ],
            d_sae=bench.d_sae,
            batch_rows=bench.batch_rows,
            steps=bench.steps,
            threads=self._threads,
        )
        for recipe, path in paths.items():
            score = evaluate(peer_predictor(recipe.kind, path), bench.heldout("sae"))
            note_point(self._note(recipe), recipe, score)


def note_point(path: Path, recipe: Recipe, score: HeldoutScore) -> None:
    """Keep what a dictionary scored."""
    assert score.fvu is not None
    setting = ", ".join(f"{key} {value}" for key, value in recipe.architecture.items() if key != "kind")
    scores = (score.l0, score.fvu, score.dead_fraction)
    point = Point(recipe.group, recipe.kind, recipe.seed, recipe.lr, setting, *scores)
    path.write_text(json.dumps(asdict(point)))
    print(path.stem, json.dumps(asdict(point)), flush=True)


def best_lr(bench: Bench | Peer, group: str, architecture: dict[str, Any]) -> float:
    """Return the learning rate with the lowest held-out FVU, doubled for as long as that lowers it."""
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    while True:
        points = bench.points([Recipe(group, architecture, lr) for lr in rates])
        best = min(points, key=lambda point: point.fvu).lr
        if best < rates[-1]:
            return best
        rates.append(2 * rates[-1])


def fvu_at(points: Sequence[Point], l0: float) -> float | None:
    """Return FVU interpolated in log L0 between the points around ``l0``; None outside of them (by over 5 %)."""
    ordered = sorted(points, key=lambda point: point.l0)
    near = [point for point in ordered if abs(point.l0 / l0 - 1) < 0.05]
    if near:
        return min(near, key=lambda point: abs(point.l0 - l0)).fvu
    below = [point for point in ordered if point.l0 < l0]
    above = [point for point in ordered if point.l0 > l0]
    if not below or not above:
        return None
    left, right = below[-1], above[0]
    share = math.log(l0 / left.l0) / math.log(right.l0 / left.l0)
    return left.fvu + share * (right.fvu - left.fvu)


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return one row per kind: mean held-out FVU at each L0 and its standard error over seeds."""
    rows = []
    for kind in dict.fromkeys(point.kind for point in points):
        mine = [point for point in points if point.kind == kind]
        rows.append((kind, *(describe(seeds_at(mine, l0)) for l0 in L0S)))
    return rows


def seeds_at(points: Sequence[Point], l0: float) -> list[float]:
    """Return each seed's FVU at ``l0``."""
    by_seed = (
        fvu_at([point for point in points if point.seed == seed], l0) for seed in {point.seed for point in points}
    )
    return [fvu for fvu in by_seed if fvu is not None]


def describe(values: Sequence[float]) -> str:
    """Return mean ± standard error."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def compare(bench: Bench, peer: Peer) -> None:
    """Print both sides' SAEs over seeds, and the difference in standard errors."""
    lr = best_lr(peer, "sae", {"kind": "topk", "k": 32})
    print("learning rate of the peer's SAEs:", lr, flush=True)
    theirs = peer.points(sae_recipes(lr))
    lr = best_lr(bench, "sae", {"kind": "topk", "k": 32})
    print("learning rate of our SAEs:", lr, flush=True)
    ours = bench.points(sae_recipes(lr))
    for kind in ("topk", "batch_topk"):
        for l0 in L0S:
            mine, other = (seeds_at([point for point in points if point.kind == kind], l0) for points in (ours, theirs))
            if len(mine) > 1 and len(other) > 1:
                error = math.sqrt(statistics.variance(mine) / len(mine) + statistics.variance(other) / len(other))
                difference = statistics.mean(mine) - statistics.mean(other)
                print(f"| {kind} | {l0} | {describe(mine)} | {describe(other)} | {difference / error:+.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path, help="a cache of one MLP, such as the one of `make demo MODEL=smollm2`")
    parser.add_argument("--site", default="layer3")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/.envs/quality"))
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", action="store_true", help="train dictionary_learning's SAEs and compare")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    sizes = {"d_sae": found.d_sae, "batch_rows": found.batch_rows, "steps": found.steps}
    bench = Bench(open_cache(found.cache), found.site, found.out, **sizes)
    lr = best_lr(bench, "transcoder", {"kind": "topk", "k": 32})
    print("learning rate of transcoders:", lr, flush=True)
    if found.peer:
        compare(bench, Peer(bench, found.threads))
        return
    transcoders = bench.points(transcoder_recipes(lr))
    lr = best_lr(bench, "sae", {"kind": "topk", "k": 32})
    print("learning rate of SAEs:", lr, flush=True)
    saes = bench.points(sae_recipes(lr))
    for title, points in (("transcoders", transcoders), ("SAEs of the output", saes)):
        print(f"\n{title}: held-out FVU at L0 {', '.join(map(str, L0S))}")
        for row in table(points):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
