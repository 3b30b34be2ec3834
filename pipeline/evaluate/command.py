"""``pipeline evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand

if TYPE_CHECKING:
    from tailrace.analysis.evaluate.splice_scores import SpliceScore
    from tailrace.storage.generations import CachePath


@click.command("evaluate", cls=SectionCommand)
@click.argument("transcoders", metavar="TRANSCODER...", type=options.ARTIFACT, nargs=-1, required=True)
@click.option("--cache", required=True, type=options.ARTIFACT, help="Cache whose contexts the model is run on.")
@options.generation
@options.out
@settings_options(EvaluateSettings)
@options.model_moved
@options.as_json
@options.compute
def command(
    transcoders: tuple[Path, ...],
    cache: CachePath,
    output: Path,
    config: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Run the language model with TRANSCODERs in place of its MLPs, each alone and all at once.

    \b
    pipeline evaluate transcoders/gpt2-l7 transcoders/gpt2-l8 --cache caches/gpt2 \\
        --out evaluations/gpt2

    A folder that holds transcoders, such as circuits-model makes, stands for all of them. Shows the cross entropy
    of the model as it is, with transcoders, and with the same sites ablated, and the share of the ablation's loss
    that the transcoders recover. tokens.parquet in --out says what happened at every token.
    """
    settings = read_settings(EvaluateSettings, config, given)

    from tailrace.pipeline.evaluate import stage as evaluate

    result = evaluate.run(
        settings,
        transcoders=transcoders,
        cache=cache,
        output=output,
        compute=compute,
        model=model,
    )
    if as_json:
        echo_made(result.path)
    elif not compute.quiet:
        for line in show_scores(result.scores):
            click.echo(line)
        click.echo(f"{result.path}: written")


def show_scores(scores: dict[str, SpliceScore]) -> list[str]:
    """Return a table of cross entropies in nats per token, shares recovered, KL, FVU and L0."""
    first = next(iter(scores.values()))
    head = ("", "spliced", "zero", "mean", "recovered", "from mean", "KL", "FVU", "L0")
    rows = [head, *(_row(name, score) for name, score in scores.items())]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    lines = [
        f"cross entropy of the model itself: {first.ce_original:.4f} nats per token, over {first.n_predictions:,} "
        f"tokens of {first.n_contexts:,} contexts"
    ]
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    for name, score in scores.items():
        lines += [
            f"{name}: attention pattern of {site} moves by {kl:.4g} nats, zero ablation by "
            f"{score.zero.pattern_kl[site]:.4g}"
            for site, kl in score.spliced.pattern_kl.items()
        ]
    return lines


def _row(name: str, score: SpliceScore) -> tuple[str, ...]:
    alone = next(iter(score.in_place.values())) if len(score.in_place) == 1 else None
    return (
        name,
        f"{score.spliced.ce:.4f}",
        f"{score.zero.ce:.4f}",
        f"{score.mean.ce:.4f}",
        _share(score.ce_recovered),
        _share(score.ce_recovered_from_mean),
        f"{score.spliced.kl:.4f}",
        "" if alone is None or alone.fvu is None else f"{alone.fvu:.4f}",
        "" if alone is None or alone.l0 is None else f"{alone.l0:.1f}",
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
