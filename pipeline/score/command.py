"""``pipeline score``."""

from __future__ import annotations

from pathlib import Path

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.feature_selection import parse_layer_features
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("score", cls=SectionCommand)
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--transcoders",
    multiple=True,
    required=True,
    type=options.ARTIFACT,
    help="Transcoder whose features are asked, or a folder of them; may be repeated.",
)
@click.option(
    "--feature",
    "features",
    multiple=True,
    help="Features to show, e.g. 89,100-120 (both ends belong to a range), and of several layers 8:89,100; may be "
    "repeated.",
)
@click.option(
    "--file",
    "files",
    type=options.FILE,
    multiple=True,
    help="File with a text, or .jsonl with one per line; may be repeated.",
)
@click.option("--raw", is_flag=True, help="Pre-activations instead of activations.")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Features to list where --feature names none.",
)
@click.option("--context-length", type=int, help="Tokens per context, BOS included. [default: 1024 at most]")
@click.option(
    "--tables",
    multiple=True,
    type=options.ARTIFACT,
    help="Their tables, or a folder of them, to tell what is known of features; may be repeated.",
)
@click.option("--dashboard", type=options.ARTIFACT, help="Their dashboard, for links to the pages of features.")
@click.option(
    "--out",
    "output",
    type=options.FILE,
    help="Picture or data to write: .html, .png or .json.",
)
@options.model_elsewhere
@options.as_json
@options.compute
def command(
    texts: tuple[str, ...],
    transcoders: tuple[Path, ...],
    features: tuple[str, ...],
    files: tuple[Path, ...],
    raw: bool,
    top: int,
    context_length: int | None,
    tables: tuple[Path, ...],
    dashboard: Path | None,
    output: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
) -> None:
    """Show what features make of TEXT, token by token; '-' reads standard input.

    \b
    pipeline score "This was his first goal" --transcoders transcoders/gpt2-l8 --feature 89,235
    pipeline score --file prompts.jsonl --transcoders transcoders/gpt2-l8 \\
        --tables tables/gpt2-l8 --out scores.html

    Of a cross-layer transcoder, or a folder that holds transcoders, all layers are asked.

    Without --feature, shows the strongest features of each token and of all. Every context begins with BOS, as in a
    cache; BOS itself is not scored.
    """
    from tailrace.pipeline.score import pictures as score_pictures
    from tailrace.pipeline.score import stage as score
    from tailrace.pipeline.score.text import as_json as scores_as_json
    from tailrace.pipeline.score.text import show

    if output is not None:
        score_pictures.check_output(output)
    scores = score.run(
        score.read_texts(texts, files),
        transcoder=transcoders,
        features=parse_layer_features(features, score.layer_sizes(transcoders)),
        raw=raw,
        top=top,
        context_length=context_length,
        tables=tables,
        model=model,
        compute=compute,
    )
    if as_json:
        options.echo_json(scores_as_json(scores))
    elif not compute.quiet:
        click.echo(show(scores), nl=False)
    if output is not None:
        score_pictures.write_scores(output, scores, dashboard)
        click.echo(f"{output}: written", err=as_json)
