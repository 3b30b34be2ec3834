"""``pipeline serve``: a dashboard over HTTP, published or made from tables as it is looked at.

Opening a published site from disk needs no server. This is for tables so large that writing all pages is not worth it,
and for looking from another machine. Read-only, and only names that belong to the site are answered.
"""

from __future__ import annotations

import functools
import logging
import mimetypes
import re
from abc import ABC, abstractmethod
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tailrace.analysis.dashboards.feature_tables import KIND as TABLES
from tailrace.analysis.dashboards.feature_tables import FeatureTables
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import INDEX, SiteData
from tailrace.pipeline.dashboard.stage import KIND, site_files
from tailrace.storage.artifact import published_kind
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, SettingsError
from tailrace.storage.names import inside

PAGES_KEPT = 64
"""Files of pages kept in memory once made, some 10 MB."""

logger = logging.getLogger(__name__)

_DATA = re.compile(r"data/([a-z0-9-]+)\.js")


class ServedSite(ABC):
    """Files of a site by name."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file such as ``site/list.js``; None if the site has none of that name."""


class PublishedSite(ServedSite):
    """The files that a published dashboard lists, and no others of its folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = set(DashboardManifest.read(path).files)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a listed file; None for one that is gone or lies elsewhere."""
        if name not in self._files:
            return None
        try:
            return inside(self._path, name).read_bytes()
        except (ArtifactCorrupt, OSError) as error:
            logger.warning("%s", error)
            return None


class TablesSite(ServedSite):
    """The same site made from tables on demand; the list of features is made at once."""

    def __init__(self, path: Path) -> None:
        tables = FeatureTables(path)
        self._data = SiteData(tables, range(tables.n_features), DashboardSettings().window)
        self._own = site_files()
        self._names = set(self._data.names())
        self._index = self._data.index()
        self._pages = functools.lru_cache(PAGES_KEPT)(self._make)

    def read(self, name: str) -> bytes | None:
        """Return the bytes of one of the site's own files, or of a data file, made now if it was not lately."""
        if name in self._own:
            return self._own[name].read_bytes()
        match = _DATA.fullmatch(name)
        if match is None:
            return None
        if match[1] == INDEX:
            return self._index
        return self._pages(match[1]) if match[1] in self._names else None

    def _make(self, name: str) -> bytes:
        ((_, content),) = self._data.pages({name})
        return content


def open_site(path: Path) -> ServedSite:
    """Open the dashboard or tables at ``path``. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    kind = published_kind(path)
    if kind not in (KIND, TABLES, None):
        raise ArtifactMismatch(f"{path}: is of kind {kind}, which cannot be served; give a dashboard, or tables")
    return TablesSite(path) if kind == TABLES else PublishedSite(path)


def open_server(path: Path, *, host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """Return a server of what lies at ``path``, listening; port 0 takes any that is free.

    Raises SettingsError if the address cannot be had, and what ``open_site`` raises.
    """
    site = open_site(path)

    class Handler(_Handler):
        served = site

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot listen on {host}, port {port} ({error}); choose another --port or --host"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    served: ServedSite
    server_version = "tailrace"
    sys_version = ""

    def do_GET(self) -> None:
        """Send a file."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send what would come before a file."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
        content = self.served.read(name)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")  # another site may be served here next
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log to our logger: requests are of interest to nobody by default."""
        logger.info("%s %s", self.address_string(), format % arguments)
