"""What a page of `pipeline serve` may ask for: only from this machine, with the server's secret, in bounded sizes."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.dashboard.answers import MOST_BYTES, Answers
from tailrace.pipeline.dashboard.serve import TOKEN_HEADER, open_server
from tailrace.storage.labels import LabelEdit, edit_labels, read_labels
from tests.support.dashboard_tables import make_tables

LONG = "x" * 201


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tables(tmp_path_factory.mktemp("made") / "tables", d_sae=8, parts=()).path


@contextmanager
def served(tables: Path, host: str = "127.0.0.1") -> Iterator[tuple[str, str]]:
    """Serve tables; yield the address and the server's secret."""
    with open_server(tables, host=host, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server.RequestHandlerClass.token  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(tables: Path) -> Iterator[tuple[str, str]]:
    with served(tables) as opened:
        yield opened


def request(address: str, content: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(address, data=content, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def post(server: tuple[str, str], name: str, asked: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    address, token = server
    own = {"Origin": address, TOKEN_HEADER: token} | headers
    status, content = request(f"{address}/{name}", json.dumps(asked).encode(), **own)
    return status, json.loads(content)


def test_a_page_reads_and_edits_a_label_and_is_told_who_was_first(server: tuple[str, str], tables: Path) -> None:
    about = {"at": "", "feature": 2}
    status, empty = post(server, "label", about)
    assert (status, empty["label"], empty["updated"]) == (200, "", None)
    mine = {**about, "label": "名 votes", "note": "two\nlines", "starred": True, "seen": None}
    status, now = post(server, "edit", mine)
    assert (status, now["label"], now["starred"]) == (200, "名 votes", True)
    edit_labels(tables, [LabelEdit(2, "bob", "elections")])
    status, theirs = post(server, "edit", {**mine, "label": "war", "seen": now["updated"]})
    assert (status, theirs["label"], theirs["author"]) == (409, "elections", "bob")
    assert "was edited since you looked at it: bob made it 'elections'" in theirs["error"]
    status, now = post(server, "edit", {**mine, "label": "war", "seen": theirs["updated"]})
    assert (status, read_labels(tables)[2].label, read_labels(tables)[2].note) == (200, "war", "two\nlines")


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("edit", {"feature": 8}, "there is no feature 8"),
        ("label", {"feature": -1}, "there is no feature -1"),
        ("label", {"feature": "2"}, "feature: wanted int, got '2'"),
        ("label", {"feature": True}, "feature: wanted int, got True"),
        ("label", {"at": "layer9", "feature": 0}, "there is no feature 0 in layer9"),
        ("edit", {"label": LONG}, "has 201 characters, at most 200 are kept"),
        ("edit", {"label": None}, "label: wanted str, got None"),
        ("edit", {"note": "n" * 10_001}, "has 10,001 characters"),
        ("edit", {"seen": "yesterday"}, "seen: wanted a time or null"),
        ("edit", {"label": "\ud800"}, "is not valid Unicode"),
        ("try", {"text": " \n"}, "the text is empty"),
        ("try", {"text": "x" * 10_001}, "at most 10,000 are read here"),
        ("try", {"text": "votes"}, "start the server with its path"),
        ("shut-down", {}, "there is no such question"),
    ],
)
def test_what_cannot_be_answered_is_said_and_changes_nothing(
    tables: Path, name: str, asked: dict[str, Any], said: str
) -> None:
    before = read_labels(tables)
    whole = {"at": "", "feature": 3, "label": "a", "note": "", "starred": False, "seen": None, "text": "a", **asked}
    status, answer = Answers({"": tables}, "ann").answer(name, whole)
    assert status == 400
    assert said in answer["error"]
    assert read_labels(tables) == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {TOKEN_HEADER: ""},
        {TOKEN_HEADER: "x" * 43},
        {TOKEN_HEADER: "é"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "[", "Origin": "http://["},
    ],
)
def test_a_request_from_elsewhere_is_refused(server: tuple[str, str], tables: Path, headers: dict[str, str]) -> None:
    before = read_labels(tables)
    asked = {"at": "", "feature": 4, "label": "x", "note": "", "starred": True, "seen": None}
    assert post(server, "edit", asked, **headers)[0] == 403
    assert read_labels(tables) == before


def test_what_is_no_json_object_or_too_long_is_not_read(server: tuple[str, str]) -> None:
    address, token = server
    own = {"Origin": address, TOKEN_HEADER: token}
    for content in (b"", b"[1]", b"{", b"[" * 10_000, b"\xff"):
        assert request(f"{address}/label", content, **own)[0] == 400
    assert request(f"{address}/label", b"{}", **own, **{"Content-Length": f"{MOST_BYTES + 1}"})[0] == 413
    assert request(f"{address}/label", b"{}", **own, **{"Content-Length": "-1"})[0] == 411


def test_only_a_page_loaded_here_has_the_secret(server: tuple[str, str], tables: Path) -> None:
    address, token = server
    assert token.encode() in request(f"{address}/")[1]
    assert b"served/live.js" in request(f"{address}/index.html")[1]
    assert request(f"{address}/served/live.js")[0] == 200
    elsewhere = request(f"{address}/", Host="evil.example")[1]
    assert b"<html" in elsewhere
    assert token.encode() not in elsewhere
    with served(tables, host="0.0.0.0") as (other, secret):
        assert post((other, secret), "label", {"at": "", "feature": 2})[0] == 403
