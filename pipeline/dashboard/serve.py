"""``pipeline serve``: a dashboard over HTTP, published or made from tables as it is looked at.

Opening a published site from disk needs no server. This is for tables so large that writing all pages is not worth it,
for looking from another machine, and for what a site on disk cannot do: to edit labels and to try texts.

Only names that belong to the site are answered. A page may edit and try if it was loaded from this machine: then it
has a secret of this run of the server, which no page of another site can read. A request has to bring it, and to come
from a page of this server. A server that other machines reach answers only who brings its key: first in the address,
then in a cookie.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import mimetypes
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tailrace.analysis.dashboards.feature_tables import KIND as TABLES
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.curves.picture import page, page_data
from tailrace.pipeline.dashboard.answers import MOST_BYTES, Answers, TriedTexts
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import INDEX, Similar, SiteData
from tailrace.pipeline.dashboard.sites import SITES, index_page, open_tables, read_matches, sites_file
from tailrace.pipeline.dashboard.stage import KIND, site_files
from tailrace.pipeline.shared.pages import content_policy, stated_policy
from tailrace.storage.artifact import MANIFEST, FileRecord, published_kind, read_bytes, unreadable
from tailrace.storage.compared import refuse_damaged, state_of
from tailrace.storage.errors import ActionableError, ArtifactMismatch, SettingsError
from tailrace.storage.labels import Label, login, read_labels
from tailrace.storage.names import inside
from tailrace.training.loop.curves import find_runs, read_all

PAGES_KEPT = 64
"""Files of pages kept in memory once made, some 10 MB."""
CLIENTS = 64
"""Clients that are answered at once; more wait for their turn."""
READ_SECONDS = 20.0
"""How long a client may take to say what it wants, in all."""
SEND_SECONDS, SENT_BYTES = 20.0, 1 << 16
"""How long it may take for so many bytes of the answer."""

logger = logging.getLogger(__name__)

TOKEN_HEADER = "X-Tailrace-Token"
SERVED_FILES = {f"served/{path.name}": path for path in sorted((Path(__file__).parent / "served").iterdir())}
"""Files of pages that a server has beside those of the site."""
_LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")

_DATA = re.compile(r"data/(?:([^/]+)/)?([a-z0-9-]+)\.js")


class ServedSite(ABC):
    """Files of a site by name."""

    answers: Answers | None = None
    """What pages may ask for beside files; None if nothing."""
    policy = content_policy(has_files=True, asks_server=True)
    """What pages may load and run, said by the server too: a site from elsewhere may state nothing itself."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file such as ``site/list.js``; None if the site has none of that name."""


class PublishedSite(ServedSite):
    """The files that a published dashboard lists, and no others of its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listed = self._read_manifest()

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a listed file, compared with its record when it is first read and after it changes.

        Raises ArtifactCorrupt for one that is not as it was published, is gone or lies elsewhere.
        """
        if self._listed[0] != state_of(self._path / MANIFEST):  # the site was made again, with other labels
            self._listed = self._read_manifest()
        recorded = self._listed[1].get(name)
        if recorded is None:
            return None
        refuse_damaged(self._path, name, recorded)
        return read_bytes(inside(self._path, name))

    def _read_manifest(self) -> tuple[tuple[int, ...], Mapping[str, FileRecord]]:
        state = state_of(self._path / MANIFEST)  # before it is read: what replaces it meanwhile is seen next time
        return state, DashboardManifest.read(self._path).files


class TablesSite(ServedSite):
    """The same site made from tables on demand, with labels as they are now; a list of features is made once."""

    def __init__(self, paths: Sequence[Path], tried: TriedTexts | None = None, matches: Sequence[Path] = ()) -> None:
        opened = open_tables(paths)
        similar = read_matches(matches, opened)
        self._parts = {key: _Part(tables, similar.get(key)) for key, tables in opened.items()}
        self._own = site_files()
        self.answers = Answers({key: part.tables.path for key, part in self._parts.items()}, login(), tried)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of one of the site's own files, or of a data file, made now if it was not lately."""
        tables = {key: part.tables for key, part in self._parts.items()}
        if name == "index.html":
            return index_page(tables)
        if name == SITES and "" not in tables:
            return sites_file(tables)
        if name in self._own:
            return self._own[name].read_bytes()
        match = _DATA.fullmatch(name)
        part = self._parts.get(match[1] or "") if match else None
        return part.read(match[2]) if match and part is not None else None


class CurvesSite(ServedSite):
    """Training curves of runs, drawn from what they have logged at the moment."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.policy = stated_policy(page([], is_live=True))

    def read(self, name: str) -> bytes | None:
        """Return the page, or the numbers that it asks for every few seconds."""
        if name == "index.html":
            return page(read_all(self._paths), is_live=True).encode(errors="replace")
        if name == "curves.json":
            return json.dumps(page_data(read_all(self._paths), is_live=True), allow_nan=False).encode()
        return None


class _Part:
    """The data files of one of a site's tables."""

    def __init__(self, tables: FeatureTables, similar: Similar | None) -> None:
        self.tables = tables
        features, window = range(tables.n_features), DashboardSettings().window
        self._data = SiteData(tables, features, window, has_documents=True, similar=similar)
        self._names = set(self._data.names())
        self._labels: Mapping[int, Label] | None = None
        self._index = b""
        self._pages = functools.lru_cache(PAGES_KEPT)(self._make)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file by its name without folder and ending; None if there is none."""
        if name == INDEX:
            return self._list()
        return self._pages(name) if name in self._names else self._data.document(name)

    def _list(self) -> bytes:
        """Return the file of the list, made again if labels have changed since."""
        if (labels := read_labels(self.tables.path)) != self._labels:
            self._labels, self._index = labels, self._data.index(labels)
        return self._index

    def _make(self, name: str) -> bytes:
        ((_, content),) = self._data.pages({name})
        return content


def open_site(paths: Sequence[Path], tried: TriedTexts | None = None, matches: Sequence[Path] = ()) -> ServedSite:
    """Open a dashboard, or tables, a folder of them, or runs, finished or not, whose training curves are shown.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch.
    """
    if all(published_kind(path) not in (KIND, TABLES) and find_runs(path) for path in paths):
        return CurvesSite(paths)
    paths = each_artifact(paths, TABLES)
    kinds = {path: published_kind(path) for path in paths}
    if len(paths) == 1 and kinds[paths[0]] in (KIND, None):
        return PublishedSite(paths[0])
    if other := [path for path, kind in kinds.items() if kind != TABLES]:
        what = f"is of kind {kinds[other[0]]}" if kinds[other[0]] else "holds none"
        raise ArtifactMismatch(f"{other[0]}: {what}, which cannot be served; give one dashboard, or tables")
    return TablesSite(paths, tried, matches)


def open_server(
    paths: Path | Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tried: TriedTexts | None = None,
    matches: Sequence[Path] = (),
) -> SiteServer:
    """Return a server of what lies at ``paths``, listening; port 0 takes any that is free.

    Raises SettingsError if the address cannot be had, and what ``open_site`` raises.
    """
    site = open_site([paths] if isinstance(paths, Path) else paths, tried, matches)

    class Handler(_Handler):
        served = site
        token = secrets.token_urlsafe(32)
        key = None if host in _LOCAL_NAMES else secrets.token_urlsafe(24)

    try:
        return SiteServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot listen on {host}, port {port} ({error}); choose another --port or --host"
        ) from error


class SiteServer(ThreadingHTTPServer):
    """Answers at most so many clients at once, those that come then wait; one that goes away is no fault."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._room = threading.BoundedSemaphore(CLIENTS)
        self._key = handler.key
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    @property
    def address(self) -> str:
        """What to open in a browser, with the key if there is one."""
        host = self.server_name
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.server_port}/{f'?key={self._key}' if self._key else ''}"

    def server_bind(self) -> None:
        """Bind, without asking a name server what the address is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, once there is room for one."""
        self._room.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as the server calls it
        """Log what went wrong with one request."""
        logger.info("a request from %s was not answered: %r", client_address, sys.exception())


class _Request(socket.SocketIO):
    """What a client sends within ``READ_SECONDS``: one that sends a byte now and then is not waited for either."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "rb")
        self._connection, self._until = connection, time.monotonic() + READ_SECONDS

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there, or wait for it. Raises TimeoutError."""
        self._connection.settimeout(max(0.001, self._until - time.monotonic()))
        return super().readinto(buffer)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with files, and POST with what a page asks for."""

    served: ServedSite
    token: str
    """What pages that edit have to bring."""
    key: str | None
    """What everybody has to bring; None where only this machine reaches the server."""
    server_version = "tailrace"
    sys_version = ""

    def setup(self) -> None:
        """Begin to read."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection))

    def do_GET(self) -> None:
        """Send a file."""
        self._send_file(with_body=True)

    def do_HEAD(self) -> None:
        """Send what would come before a file."""
        self._send_file(with_body=False)

    def do_POST(self) -> None:
        """Answer a page of this server."""
        try:
            status, answer = self._answer()
        except _Damage as error:
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        content = json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
        self._send(status, "application/json", content, with_body=True)

    def _answer(self) -> tuple[HTTPStatus, dict[str, Any]]:
        answers = self.served.answers
        if answers is None or not self._is_from_here():
            return HTTPStatus.FORBIDDEN, {"error": "this is only for pages loaded on the server's own machine"}
        origin, token = self.headers.get("Origin", ""), self.headers.get(TOKEN_HEADER, "")
        if origin != f"http://{self.headers['Host']}" or not _is_same(token, self.token):
            return HTTPStatus.FORBIDDEN, {
                "error": "the server was started anew since this page was loaded; load it again"
            }
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length):
            return HTTPStatus.LENGTH_REQUIRED, {"error": "the request does not say how long it is"}
        if int(length) > MOST_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"at most {MOST_BYTES:,} bytes are read"}
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            return HTTPStatus.BAD_REQUEST, {"error": "wanted a JSON object"}
        name = self.path.removeprefix("/")
        with _told(name):
            return answers.answer(name, asked)

    def _is_from_here(self) -> bool:
        """Return whether the browser calls this server by a name of the machine itself.

        A page of another site can make its own name lead here, and would then be of the same origin.
        """
        try:
            return self.key is None and urlsplit(f"//{self.headers.get('Host', '')}").hostname in _LOCAL_NAMES
        except ValueError:
            return False

    def _is_let_in(self) -> bool:
        """Return whether files are sent; if not, a refusal, or the cookie, has been sent."""
        if self.key is None:
            if not self._is_from_here():  # a page of another site whose name leads here
                self.send_error(HTTPStatus.FORBIDDEN, "this server answers to localhost")
            return self._is_from_here()
        name = f"tailrace-{self.connection.getsockname()[1]}"  # cookies are of a machine, not of a port
        given = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
        if _is_same(given, self.key):
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Set-Cookie", f"{name}={self.key}; Path=/; HttpOnly; SameSite=Lax")
            self.send_header("Location", "/")  # so that the key stays in no history and in no link that is copied
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(name)
        except CookieError:
            cookie = None
        if cookie is not None and _is_same(cookie.value, self.key):
            return True
        self.send_error(HTTPStatus.FORBIDDEN, "open the address that the server printed when it started")
        return False

    def _send_file(self, with_body: bool) -> None:
        if not self._is_let_in():
            return
        name = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
        try:
            with _told(name):
                content = SERVED_FILES[name].read_bytes() if name in SERVED_FILES else self.served.read(name)
        except _Damage as error:
            said = f"{error}\n".encode(errors="replace")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", said, with_body)
            return
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        if name == "index.html" and self.served.answers is not None and self._is_from_here():
            page = content.decode()
            page = page.replace(stated_policy(page), self.served.policy, 1)
            content = page.replace("</head>", f"{_head(self.token)}</head>", 1).encode()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._send(HTTPStatus.OK, f"{kind}; charset=utf-8" if kind.startswith("text/") else kind, content, with_body)

    def _send(self, status: HTTPStatus, kind: str, content: bytes, with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-cache")  # another site may be served here next
        self.end_headers()
        for start in range(0, len(content) if with_body else 0, SENT_BYTES):
            self.connection.settimeout(SEND_SECONDS)
            self.wfile.write(content[start : start + SENT_BYTES])

    def end_headers(self) -> None:
        """End what comes before an answer, an error's too, with what other sites may do with it: nothing."""
        # framed by another site, that could lay its own buttons over ours
        self.send_header("Content-Security-Policy", f"{self.served.policy}; frame-ancestors 'self'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")  # a script of data is for its own pages
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log to our logger: requests are of interest to nobody by default."""
        logger.info("%s %s", self.address_string(), format % arguments)


class _Damage(Exception):
    """What cannot be read or written while the server runs, in a sentence."""


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Log an error that a user can act on, or of the disk, and raise it as what is answered; others are faults."""
    try:
        yield
    except (ActionableError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            said = str(unreadable(error, Path(error.filename)))
        logger.warning("%s was not answered: %s", name, said)
        raise _Damage(said) from error


def _is_same(given: str, secret: str) -> bool:
    """Compare in a time that tells nothing."""
    return secrets.compare_digest(given.encode(errors="replace"), secret.encode())


def _head(token: str) -> str:
    """Return what a page needs to edit labels and to try texts."""
    scripts = [f'<script defer src="{name}"></script>' for name in SERVED_FILES if name.endswith(".js")]
    styles = [f'<link rel="stylesheet" href="{name}">' for name in SERVED_FILES if name.endswith(".css")]
    return "\n".join([f'<meta name="token" content="{token}">', *styles, *scripts, ""])
