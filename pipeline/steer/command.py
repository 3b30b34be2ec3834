"""``pipeline steer``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand
from tailrace.pipeline.steer.settings import SteerSettings, check_output


@click.command("steer", cls=SectionCommand)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--transcoders", multiple=True, required=True, type=options.ARTIFACT,
    help="Transcoder of one layer, to be given again for each; folder that holds those of layers; a cross-layer one.",
)  # fmt: skip
@click.option(
    "--file", "files", type=options.FILE, multiple=True,
    help="File with a prompt per line, as text or .jsonl; may be repeated.",
)  # fmt: skip
@click.option(
    "--from-circuit", type=options.ARTIFACT,
    help="Circuit whose nodes are changed. Without PROMPT its own is run, and nodes are changed at their tokens only.",
)  # fmt: skip
@click.option(
    "--tables", multiple=True, type=options.ARTIFACT,
    help="Tables of the transcoders, or a folder of them, for what is known of features; --random needs them.",
)  # fmt: skip
@click.option("--out", "output", type=options.FILE, help="File for all texts and numbers: .html, .parquet or .json.")
@settings_options(SteerSettings)
@options.model_elsewhere
@options.as_json
@options.compute
def command(
    prompts: tuple[str, ...],
    transcoders: tuple[Path, ...],
    files: tuple[Path, ...],
    from_circuit: Path | None,
    tables: tuple[Path, ...],
    output: Path | None,
    config: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Let the language model write on after PROMPT with features changed, beside what it writes by itself.

    \b
    pipeline steer "The people of this country" --transcoders transcoders/gpt2 \\
        --feature 3:1850=+10,+30 --feature 8:89=off
    pipeline steer --file prompts.txt --transcoders transcoders/gpt2-l8 --tables tables/gpt2-l8 \\
        --feature 89=+30 --random 20 --count "\\bwar\\b" --out steered.html
    pipeline steer --transcoders transcoders/gpt2 --from-circuit circuits/paris --nodes 10=off

    KL and the share of changed next tokens are along the text that the model writes by itself.
    """
    settings = read_settings(SteerSettings, config, given)
    if output is not None:
        check_output(output)

    from tailrace.pipeline.steer import stage as steer
    from tailrace.pipeline.steer.page import write_result
    from tailrace.pipeline.steer.text import json_of, show

    result = steer.run(
        settings,
        steer.read_prompts(prompts, files),
        transcoders=transcoders,
        from_circuit=from_circuit,
        tables=tables,
        model=model,
        compute=compute,
    )
    if output is not None:
        write_result(output, result)
    if as_json:
        options.echo_json(json_of(result))
    elif not compute.quiet:
        click.echo(show(result, shutil.get_terminal_size().columns), nl=False)
    if output is not None:
        click.echo(f"{output}: written", err=as_json)
