"""A real browser for tests: the system's Chromium without a window, watched for errors and for what it asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, expect, sync_playwright

SKIP, PLACE = "TAILRACE_SKIP_BROWSER", "TAILRACE_CHROMIUM"
"""Environment variables: 1 skips these tests; the path of a Chromium other than the one found."""

Scheme = Literal["light", "dark"]

expect.set_options(timeout=30_000)  # a machine that runs other tests, too, may be slow


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium; fail where there is none, unless tests with a browser are to be skipped."""
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"{SKIP}=1")
    program = os.environ.get(PLACE) or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.fail(f"no Chromium found; install one (apt install chromium), set {PLACE}, or skip with {SKIP}=1")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to be root in its sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page of which every complaint and every request is kept."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))


@contextmanager
def watched_page(
    browser: Browser, scheme: Scheme = "light", origin: str = "file:///", width: int = 1280
) -> Iterator[Watched]:
    """Open a page in a fresh profile; fail on leaving it if it complained, or asked for anything not of ``origin``."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 860})
    context.set_default_timeout(30_000)
    try:
        watched = Watched(context.new_page())
        yield watched
        assert watched.complaints == []
        assert [address for address in watched.requests if not address.startswith(origin)] == []
    finally:
        context.close()


def accessibility_problems(page: Page) -> list[str]:
    """Return axe-core's findings against the whole page by its default rules, a line each."""
    # preloading would fetch the style sheets, which a page opened from disk may not, for a rule that is not among these
    options = {"resultTypes": ["violations"], "preload": False}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]} ({node['failureSummary']})" for rule in found for node in rule["nodes"]
    ]
