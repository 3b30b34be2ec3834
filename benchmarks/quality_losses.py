"""Claim: at the same L0, which replaces an MLP better: a transcoder of it, or an SAE of its output?

Takes two published sweeps over k, one of an MLP's site and one of its output alone, puts each dictionary into the
language model in turn, and draws L0 against the cross entropy: the comparison of Dunefsky et al. (2024, section 4) on a
small real model. An SAE reads the output it reproduces, so the MLP still runs; a transcoder replaces it.

    pipeline cache … --layers 10 --hooks blocks.10.mlp.hook_out --out CACHE
    pipeline train CACHE --site layer10 --sweep k=8,16,32,64,128 … --out TRANSCODERS
    pipeline train CACHE --site blocks.10.mlp.hook_out --sweep k=8,16,32,64,128 … --out SAES
    python -m benchmarks.quality_losses CACHE TRANSCODERS SAES
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tailrace.analysis.evaluate.next_tokens import next_token_losses
from tailrace.analysis.evaluate.recovered import recovered
from tailrace.analysis.splice.replacement import Substitute, Transcoded, ZeroAblated, run_replaced
from tailrace.pipeline.cache.recorded_model import RecordedModel, open_recorded_model, sample_contexts
from tailrace.pipeline.evaluate.pareto_plot import style
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.runs_table import FINISHED
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import Site
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder


class Point(NamedTuple):
    """A dictionary in the model."""

    group: str
    l0: float
    fvu: float
    """Of what it reproduces, on held-out rows."""
    loss: float


class Models:
    """The language model on a sample of held-out contexts."""

    def __init__(self, recorded: RecordedModel, n_contexts: int) -> None:
        split = recorded.cache.split("heldout")
        self._recorded = recorded
        self._batches = list(recorded.batches(split, sample_contexts(split, n_contexts, 0), 4))

    def loss(self, substitutes: dict[Site, Substitute]) -> float:
        """Return the mean cross entropy in nats, with sites replaced."""
        losses = []
        for batch in self._batches:
            with torch.inference_mode():
                logits = run_replaced(self._recorded.bridge, batch.tokens, substitutes, batch.where)
            losses.append(next_token_losses(logits, batch.tokens))
        return float(torch.cat(losses).mean())


def measured(models: Models, path: Path, group: str) -> Iterator[Point]:
    """Yield a point for every finished run of a sweep, by rising L0."""
    runs = [path / run.path for run in sweep.read_result(path).runs if run.status == FINISHED]
    scores = {run: TranscoderManifest.read(run) for run in runs}
    for run in sorted(runs, key=lambda run: scores[run].metrics.heldout["l0"]):
        heldout = scores[run].metrics.heldout
        coder = load_transcoder(run).requires_grad_(False)
        loss = models.loss({scores[run].site: Transcoded(coder)})
        yield Point(group, heldout["l0"], heldout["fvu"], loss)


def draw(points: list[Point], original: float, path: Path) -> None:
    """Draw L0 against cross entropy, one line per kind of dictionary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    groups = dict.fromkeys(point.group for point in points)
    for index, group in enumerate(groups):
        colour, marker, _ = style(index)
        own = [(point.l0, point.loss) for point in points if point.group == group]
        axes.plot(*zip(*own, strict=True), color=colour, marker=marker, label=group)
    axes.axhline(original, color="#555555", linewidth=1, linestyle="--")
    axes.annotate("the model itself", (1, original), (-4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="L0: active features per token", ylabel="cross entropy, nats per token")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("transcoders", type=Path)
    parser.add_argument("saes", type=Path)
    parser.add_argument("--contexts", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("docs/images/transcoder-and-sae.png"))
    found = parser.parse_args()
    models = Models(open_recorded_model(open_cache(found.cache)), found.contexts)
    (site,) = {
        TranscoderManifest.read(found.transcoders / run.path).site
        for run in sweep.read_result(found.transcoders).runs
        if run.status == FINISHED
    }
    original, zero = models.loss({}), models.loss({site: ZeroAblated()})
    print(f"cross entropy: the model {original:.4f}, with the MLP's output zeroed {zero:.4f}")
    print("| kind | L0 | FVU of what it reproduces | cross entropy | recovered |\n| --- | --- | --- | --- | --- |")
    points = []
    for path, group in ((found.transcoders, "transcoder"), (found.saes, "SAE of the output")):
        for point in measured(models, path, group):
            points.append(point)
            share = recovered(zero, point.loss, original)
            shown = "–" if share is None else f"{share:.1%}"
            print(f"| {group} | {point.l0:.1f} | {point.fvu:.4f} | {point.loss:.4f} | {shown} |", flush=True)
    found.out.parent.mkdir(parents=True, exist_ok=True)
    draw(points, original, found.out)


if __name__ == "__main__":
    main()
