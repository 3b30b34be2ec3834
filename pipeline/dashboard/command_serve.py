"""``pipeline serve``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from tailrace.pipeline.artifacts.folders import refuse_folder
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.sections import SectionCommand
from tailrace.storage.formats import TABLES_KIND


@click.command("serve", cls=SectionCommand)
@click.argument("artifact", metavar="DASHBOARD_OR_TABLES", type=options.ARTIFACT)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Another address lets other machines look, too.")
def command(artifact: Path, port: int, host: str) -> None:
    """Show a dashboard over HTTP until stopped: a published one, or pages made from tables as they are looked at.

    \b
    pipeline serve tables/gpt2-l8
    pipeline serve dashboards/gpt2-l8 --port 9000

    A published dashboard opens from disk as well. There is no password: whoever reaches the address can read.
    """
    from tailrace.pipeline.dashboard import serve
    from tailrace.pipeline.dashboard.stage import KIND as DASHBOARD

    for kind in (TABLES_KIND, DASHBOARD):
        refuse_folder(artifact, kind)
    with serve.open_server(artifact, host=host, port=port) as server:
        click.echo(f"http://{host}:{server.server_address[1]}/  (stop with Ctrl-C)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
