"""`pipeline serve`: the site over HTTP, from a dashboard or straight from tables, and nothing but the site."""

from __future__ import annotations

import http.client
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tailrace.pipeline.dashboard import serve
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import PAGES_KEPT, TablesSite, open_server
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import SiteData, unpack
from tailrace.storage.errors import ArtifactMissing, SettingsError
from tests.support.dashboard_tables import MadeTables, make_tables
from tests.support.run_logs import write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeTables:
    return make_tables(tmp_path_factory.mktemp("made") / "tables", d_sae=40)


@contextmanager
def served(path: Path) -> Iterator[str]:
    with open_server(path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def get(address: str) -> tuple[int, bytes, str]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b"", ""


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


def test_more_clients_than_there_is_room_for_are_answered_in_turn(
    made: MadeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "CLIENTS", 2)
    with served(made.path) as address, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(get, [f"{address}/index.html"] * 64))
    assert {status for status, _, _ in answers} == {200}
