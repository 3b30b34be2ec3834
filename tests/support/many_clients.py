"""Many clients of ``pipeline serve`` at once: ``python -m tests.support.many_clients --clients 200 --seconds 30``.

Each asks for one file after the other, over a new connection each time, as the server's HTTP/1.0 wants it. A request
fails if the connection is refused or cut, or the answer is not the file as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tailrace.pipeline.dashboard.serve import TablesSite
from tests.support.dashboard_tables import make_tables

ANSWER_SECONDS = 60
NAMES = ("index.html", "site/list.js", "site/page.css", "data/index.js", "data/passages.js", "data/features-000032.js")


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """Serve tables by the command, in a process of its own; yield its address."""
    command = [sys.executable, "-m", "tailrace", "serve", str(path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


async def ask(address: str, name: str, content: bytes) -> str:
    """Return what became of one request: ``answered``, or why it failed."""
    server = urlsplit(address)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(server.hostname, server.port)
            writer.write(f"GET /{name} HTTP/1.0\r\nHost: {server.netloc}\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    if not head.startswith(b"HTTP/1.0 200 "):
        return head[:12].decode(errors="replace") or "no answer"
    return "answered" if body == content or name == "index.html" else "another content"


async def ask_often(address: str, contents: Mapping[str, bytes], n_clients: int, seconds: float) -> Counter[str]:
    """Return how often requests of all clients were answered, and how often they failed, by reason."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    names = list(contents)

    async def client(number: int) -> None:
        while time.monotonic() < end:
            name = names[number % len(names)]
            outcomes[await ask(address, name, contents[name])] += 1
            number += 1

    await asyncio.gather(*(client(number) for number in range(n_clients)))
    return outcomes


def main() -> None:
    """Serve small tables and print what became of the requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = make_tables(Path(scratch) / "tables").path
        contents = site_contents(tables)
        with serving(tables) as address:
            outcomes = asyncio.run(ask_often(address, contents, chosen.clients, chosen.seconds))
    failed = outcomes.total() - outcomes["answered"]
    reasons = {reason: n for reason, n in outcomes.items() if reason != "answered"} or ""
    sys.stdout.write(f"{chosen.clients} clients: {outcomes.total():,} requests, {failed:,} failed {reasons}\n")


def site_contents(tables: Path) -> dict[str, bytes]:
    """Return the files that clients ask for."""
    site = TablesSite([tables])
    return {name: site.read(name) or b"" for name in NAMES}


if __name__ == "__main__":
    main()
