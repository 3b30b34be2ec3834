"""`pipeline serve`: the site over HTTP, from a dashboard or straight from tables, and nothing but the site."""

from __future__ import annotations

import asyncio
import errno
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

from tailrace.pipeline.dashboard import serve
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.answers import Answers
from tailrace.pipeline.dashboard.serve import PAGES_KEPT, TablesSite, open_server
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import SiteData, unpack
from tailrace.storage.artifact import describe_files, read_sealed, seal
from tailrace.storage.errors import ArtifactMissing, SettingsError
from tailrace.storage.labels import LabelEdit, edit_labels
from tests.faults.damage import flip
from tests.support.dashboard_tables import MadeTables, make_tables
from tests.support.many_clients import ask_often, serving, site_contents
from tests.support.run_logs import write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeTables:
    return make_tables(tmp_path_factory.mktemp("made") / "tables", d_sae=40)


@contextmanager
def served(path: Path, host: str = "127.0.0.1") -> Iterator[str]:
    with open_server(path, host=host, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.address.removesuffix("/")
        finally:
            server.shutdown()
            thread.join()


def get(address: str) -> tuple[int, bytes, str]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def headers(address: str) -> Mapping[str, str]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return dict(error.headers)


def without_live_parts(content: bytes) -> bytes:
    """Leave out what lets a page edit labels and try texts."""
    content = content.replace(b"; connect-src 'self'", b"")
    return re.sub(
        rb'<(?:meta name="token"|link rel="stylesheet" href="served/|script defer src="served/).*\n', b"", content
    )


def test_pages_made_on_demand_are_those_of_the_published_site(made: MadeTables, tmp_path: Path) -> None:
    published = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True).path
    names = ["", "index.html", "site/list.js", "site/page.css", "data/index.js", "data/features-000032.js"]
    with served(published) as from_disk, served(made.path) as on_demand:
        for name in names:
            wanted = (published / (name or "index.html")).read_bytes()
            assert get(f"{from_disk}/{name}")[:2] == (200, wanted)
            status, content, _ = get(f"{on_demand}/{name}")
            assert (status, without_live_parts(content)) == (200, wanted)
        assert [get(f"{on_demand}/{name}")[2] for name in names[1:4]] == [
            *("text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8")
        ]


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "../tables/manifest.json", "%2e%2e/tables/manifest.json", "data/features-000064.js", "nothing"],
)
def test_what_does_not_belong_to_the_site_is_not_served(made: MadeTables, tmp_path: Path, name: str) -> None:
    published = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True).path
    for path in (published, made.path):
        with served(path) as address:
            assert get(f"{address}/{name}")[0] == 404


def test_a_page_is_made_once(made: MadeTables, monkeypatch: pytest.MonkeyPatch) -> None:
    site = TablesSite([made.path])
    first = site.read("data/features-000000.js")
    assert first is not None
    assert [page["feature"] for page in unpack(first)["features"]] == list(range(32))
    monkeypatch.setattr(SiteData, "pages", None)
    assert site.read("data/features-000000.js") is first
    assert PAGES_KEPT > 1


def test_the_server_says_a_policy_for_a_site_that_states_none(made: MadeTables, tmp_path: Path) -> None:
    published = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True).path
    (published / "index.html").write_text("<script>alert(1)</script>")
    manifest = read_sealed(published / "manifest.json")
    manifest["files"] |= describe_files(published, ["index.html"])
    del manifest["digest"]
    (published / "manifest.json").write_bytes(seal(manifest))
    write_run(tmp_path / "run", n_lines=3)
    for path, scripts in ((published, "'self'"), (made.path, "'self'"), (tmp_path / "run", "'sha256-")):
        with served(path) as address:
            for name in ("", "nothing"):
                answer = headers(f"{address}/{name}")
                policy = dict(part.split(" ", 1) for part in answer["Content-Security-Policy"].split("; "))
                assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
                assert policy["script-src"].startswith(scripts)
                assert "unsafe" not in policy["script-src"]
                assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'self'")


def test_a_published_file_that_changed_is_not_served(made: MadeTables, tmp_path: Path) -> None:
    published = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True).path
    page, lost = published / "data" / "features-000000.js", published / "data" / "passages.js"
    kept = page.read_bytes()
    flip(page, np.random.Generator(np.random.Philox(0)))
    with served(published) as address:
        status, said, kind = get(f"{address}/data/{page.name}")
        assert (status, kind) == (500, "text/plain; charset=utf-8")
        assert f"{page}: checksum is" in said.decode()
        assert "pipeline verify" in said.decode()
        page.write_bytes(kept)
        assert get(f"{address}/data/{page.name}")[:2] == (200, kept)
        lost.unlink()
        assert get(f"{address}/data/{lost.name}")[0] == 500
        assert get(f"{address}/index.html")[0] == 200


def test_a_site_that_is_made_again_is_served_as_it_is_now(tmp_path: Path) -> None:
    tables = make_tables(tmp_path / "tables", d_sae=8).path
    site = dashboard.run(DashboardSettings(), tables=tables, output=tmp_path / "site", quiet=True).path
    with served(site) as address:
        assert get(f"{address}/data/index.js")[0] == 200
        edit_labels(tables, [LabelEdit(1, "anne", "a word")])
        dashboard.run(DashboardSettings(), tables=tables, output=site, quiet=True)
        assert get(f"{address}/data/index.js")[:2] == (200, (site / "data" / "index.js").read_bytes())


def test_damage_while_it_runs_is_told_and_logged(
    made: MadeTables, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables, run = shutil.copytree(made.path, tmp_path / "tables"), tmp_path / "run"
    write_run(run, n_lines=3)
    with served(tables) as of_tables, served(run) as of_run:
        (tables / "examples.parquet").unlink()
        with (run / "metrics.jsonl").open("a") as file:
            file.write("no line of a log\n")
        for address, where in (
            (f"{of_tables}/data/features-000000.js", tables / "examples.parquet"),
            (f"{of_run}/curves.json", run / "metrics.jsonl"),
        ):
            status, said, _ = get(address)
            assert (status, said.decode().startswith(f"{where}: ")) == (500, True)
            assert f"was not answered: {where}: " in caplog.text


def test_an_edit_that_the_disk_refuses_is_told(made: MadeTables, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "labels.parquet")

    monkeypatch.setattr(Answers, "answer", refuse)
    with served(made.path) as address:
        (token,) = re.findall(r'name="token" content="([^"]*)"', get(address)[1].decode())
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.request("POST", "/label", "{}", {"Origin": address, serve.TOKEN_HEADER: token})
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"].partition(" (")[0]) == (500, "labels.parquet: cannot be read")
        connection.close()


def test_an_address_that_is_taken_is_told(made: MadeTables) -> None:
    with open_server(made.path, port=0) as server, pytest.raises(SettingsError, match="choose another --port"):
        open_server(made.path, port=server.server_address[1])


def test_nothing_to_serve_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="there is no dashboard here"):
        open_server(tmp_path, port=0)


def test_only_this_machines_names_are_answered_where_only_it_listens(made: MadeTables) -> None:
    with served(made.path) as address:
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("rebound.example", 403)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
            connection.request("GET", "/index.html", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()


def test_other_machines_need_the_key_which_the_address_turns_into_a_cookie(made: MadeTables) -> None:
    with served(made.path, host="0.0.0.0") as printed:
        form = re.fullmatch(rf"http://{re.escape(socket.gethostname())}:(\d+)/\?key=([\w-]{{32}})", printed)
        assert form is not None
        port, key = form.groups()
        address = f"http://127.0.0.1:{port}"
        for refused in ("/", "/data/index.js", "/?key=", f"/?key={key[:-1]}", "/?key=%ff"):
            assert get(f"{address}{refused}")[0] == 403, refused
        name = f"tailrace-{port}"
        for cookie in (f"{name}={key}x", f"other={key}", f"{name}", "=;=", f"{name}=\u00e9"):
            assert raw(address, "GET", "/", Cookie=cookie)[0] == 403, cookie
        status, answer = raw(address, "GET", f"/?key={key}")
        assert (status, answer["Location"]) == (303, "/")
        assert answer["Set-Cookie"] == f"{name}={key}; Path=/; HttpOnly; SameSite=Lax"
        status, answer = raw(address, "GET", "/index.html", Cookie=f"a=b; {name}={key}")
        assert (status, answer["Set-Cookie"]) == (200, None)


def raw(address: str, method: str, name: str, **headers: str) -> tuple[int, Message]:
    """Ask without following where an answer sends; return its status and headers."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request(method, name, headers=headers)
    answer = connection.getresponse()
    connection.close()
    return answer.status, answer.headers


def test_a_client_that_is_silent_or_slow_is_not_waited_for(made: MadeTables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "READ_SECONDS", 0.2)
    monkeypatch.setattr(serve, "CLIENTS", 2)
    stop = threading.Event()

    def trickle(client: socket.socket) -> None:
        with suppress(OSError):
            for byte in itertools.cycle(b"GET / HTTP/1.0\r\nX-Header: xxxxxxxx"):
                client.sendall(bytes([byte]))
                if stop.wait(0.05):
                    return

    with served(made.path) as address:
        where = ("127.0.0.1", int(address.rpartition(":")[2]))
        silent, slow = (socket.create_connection(where, timeout=10) for _ in range(2))
        thread = threading.Thread(target=trickle, args=(slow,))
        thread.start()
        try:
            assert get(f"{address}/index.html")[0] == 200  # though both threads were taken
            assert silent.recv(1) == b""
        finally:
            stop.set()
            thread.join()
            silent.close()
            slow.close()


def test_an_answer_that_nobody_takes_is_given_up(made: MadeTables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(serve, "CLIENTS", 1)
    large = bytes(1 << 25)  # more than the system buffers
    monkeypatch.setattr(TablesSite, "read", lambda _, name: large if name == "large" else b"small")
    with (
        served(made.path) as address,
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as idle,
    ):
        idle.sendall(b"GET /large HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert get(f"{address}/small")[1] == b"small"  # though the only thread was taken


@pytest.mark.slow
def test_two_hundred_clients_have_every_request_answered(made: MadeTables) -> None:
    """`python -m tests.support.many_clients` does the same for longer."""
    with serving(made.path) as address:
        outcomes = asyncio.run(ask_often(address, site_contents(made.path), 200, 8))
    assert outcomes.total() > 200
    assert set(outcomes) == {"answered"}


def test_more_clients_than_there_is_room_for_are_answered_in_turn(
    made: MadeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "CLIENTS", 2)
    with served(made.path) as address, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(get, [f"{address}/index.html"] * 64))
    assert {status for status, _, _ in answers} == {200}
