"""``pipeline serve``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from tailrace.pipeline.artifacts.folders import refuse_folder
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.sections import SectionCommand


@click.command("serve", cls=SectionCommand)
@click.argument("artifacts", metavar="DASHBOARD_TABLES_OR_RUN...", nargs=-1, required=True, type=options.ARTIFACT)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Another address lets other machines look, too, with the key that is printed.",
)
@click.option(
    "--transcoders",
    "transcoders",
    multiple=True,
    type=options.ARTIFACT,
    help="Transcoder of the tables, or a folder of them, to try texts with; may be repeated. By default that of their "
    "digest, if it lies beside them or beside their folder.",
)
@options.matches
@options.model_elsewhere
@options.computing(options.device, options.threads)
def command(
    artifacts: tuple[Path, ...],
    port: int,
    host: str,
    transcoders: tuple[Path, ...],
    matches: tuple[Path, ...],
    model: str | None,
    compute: Compute,
) -> None:
    """Show a dashboard or training curves over HTTP until stopped: pages of tables are made as they are looked at.

    \b
    pipeline serve tables/gpt2-l8
    pipeline serve tables/gpt2-l8 --transcoders transcoders/gpt2-l8
    pipeline serve dashboards/gpt2-l8 --port 9000
    pipeline serve transcoders/gpt2-l8

    Of a run, or a sweep, the training curves are shown, with new numbers while it trains.
    On the pages of tables, whoever is at this machine can edit labels, notes and stars, and try texts. With --host,
    other machines can read, by the address that is printed: it has a key of this run of the server.
    """
    from tailrace.pipeline.dashboard import serve
    from tailrace.pipeline.dashboard.answers import TriedTexts
    from tailrace.pipeline.dashboard.stage import KIND

    for artifact in artifacts:
        refuse_folder(artifact, KIND)
    tried = TriedTexts(transcoders, model=model, compute=compute)
    with serve.open_server(artifacts, host=host, port=port, tried=tried, matches=matches) as server:
        click.echo(f"{server.address}  (stop with Ctrl-C)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
