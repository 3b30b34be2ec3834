"""Claim: at the same L0, which replaces an MLP better: a transcoder of it, or an SAE of its output?

Takes the dictionaries that quality.py trained, puts each into the language model in turn, and draws L0 against the
cross entropy: the comparison of Dunefsky et al. (2024, section 4) on a small real model. Both kinds saw the same rows
for the same number of steps. An SAE reads the output it reproduces, so the MLP still runs; a transcoder replaces it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from analysis.next_tokens import next_token_losses
from analysis.replacement import Substitute, Transcoded, ZeroAblated, run_replaced
from analysis.splice_scores import recovered
from benchmarks.quality import Point, Recipe, sae_recipes, transcoder_recipes
from pipeline.pareto_plot import COLOURS, MARKS
from pipeline.recorded_model import RecordedModel, open_recorded_model, sample_contexts
from storage.activation_cache import open_cache
from storage.cache_format import Site
from training.architectures.base import Transcoder
from training.settings import TrainSettings

KINDS = ("topk", "batch_topk")


class Models:
    """The language model on a sample of held-out contexts."""

    def __init__(self, recorded: RecordedModel, site: Site, n_contexts: int) -> None:
        split = recorded.cache.split("heldout")
        self._recorded, self._site = recorded, site
        self._batches = list(recorded.batches(split, sample_contexts(split, n_contexts, 0), 4))
        self.original, self.zero = self.loss(None, site), self.loss(ZeroAblated(), site)

    def loss(self, substitute: Substitute | None, site: Site) -> float:
        """Return the mean cross entropy in nats."""
        losses = []
        for batch in self._batches:
            with torch.inference_mode():
                substitutes = {} if substitute is None else {site: substitute}
                logits = run_replaced(self._recorded.bridge, batch.tokens, substitutes, batch.where)
            losses.append(next_token_losses(logits, batch.tokens))
        return float(torch.cat(losses).mean())

    def loss_with(self, group: str, transcoder: Transcoder) -> float:
        """Return the loss with a transcoder of the MLP, or an SAE of its output, in place."""
        site = self._site
        if group == "sae":
            site = Site("sae", site.hook_out, site.hook_out, site.d_out, site.d_out, site.dtype)
        return self.loss(Transcoded(transcoder.eval().requires_grad_(False)), site)


def trained(folder: Path) -> Iterator[tuple[Recipe, Point, Transcoder]]:
    """Yield the dictionaries of quality.py: seed 0, the learning rate it settled on."""
    points = {path: Point(**json.loads(path.read_text())) for path in sorted(folder.glob("[ts]*.json"))}
    # the search left single dictionaries at other rates
    rates = {
        group: Counter(point.lr for point in points.values() if point.group == group) for group in ("transcoder", "sae")
    }
    for path, point in points.items():
        if point.lr != rates[point.group].most_common(1)[0][0]:
            continue
        makers = {"transcoder": transcoder_recipes, "sae": sae_recipes}
        for recipe in makers[point.group](point.lr):
            if recipe.name == path.stem and recipe.kind in KINDS and recipe.seed == 0:
                weights = load_file(path.with_suffix(".safetensors"))
                d_sae, d_in = weights["W_enc"].shape
                architecture = TrainSettings.model_validate({"architecture": recipe.architecture}).architecture
                transcoder = architecture.build(d_in, weights["W_dec"].shape[1], d_sae)
                transcoder.load_state_dict(weights)
                yield recipe, point, transcoder


def draw(found: list[tuple[Point, float]], original: float, path: Path) -> None:
    """Draw L0 against cross entropy, one line per kind of dictionary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = [(group, kind) for group in ("transcoder", "sae") for kind in KINDS]
    for (group, kind), colour, marker in zip(lines, COLOURS, MARKS, strict=False):
        points = sorted((point.l0, loss) for point, loss in found if (point.group, point.kind) == (group, kind))
        if points:
            name = {"transcoder": "transcoder", "sae": "SAE of the output"}[group]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{name}, {kind}")
    axes.axhline(original, color="#555555", linewidth=1, linestyle="--")
    axes.annotate("the model itself", (1, original), (-4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="L0: active features per token", ylabel="cross entropy, nats per token")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--site", default="layer3")
    parser.add_argument("--dictionaries", type=Path, default=Path("benchmarks/.envs/quality"))
    parser.add_argument("--contexts", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("docs/images/transcoder-and-sae.png"))
    found = parser.parse_args()
    cache = open_cache(found.cache)
    site = cache.sites[found.site]
    models = Models(open_recorded_model(cache), site, found.contexts)
    print(f"cross entropy: the model {models.original:.4f}, with the MLP's output zeroed {models.zero:.4f}")
    print("| kind | L0 | FVU of what it reproduces | cross entropy | recovered |\n| --- | --- | --- | --- | --- |")
    losses = []
    for recipe, point, transcoder in trained(found.dictionaries):
        loss = models.loss_with(recipe.group, transcoder)
        losses.append((point, loss))
        share = recovered(models.zero, loss, models.original)
        name = f"{recipe.group}, {recipe.kind}"
        print(f"| {name} | {point.l0:.1f} | {point.fvu:.4f} | {loss:.4f} | {share or 0:.1%} |", flush=True)
    found.out.parent.mkdir(parents=True, exist_ok=True)
    draw(losses, models.original, found.out)


if __name__ == "__main__":
    main()
