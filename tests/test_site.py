"""The docs site, built and opened from disk: it asks for nothing elsewhere, and its search and pictures work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browsers import watched_page
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loads = r'<(?:script|img|iframe|link)[^>]+(?:src|href)="(?:https?:)?//[^"]+"'
    assert {page.name: found for page in pages if (found := re.findall(loads, page.read_text()))} == {}
    assert len(pages) > 40


@pytest.mark.slow
def test_search_works_from_disk_and_leads_to_the_page_of_a_flag(site: Path, browser: Browser) -> None:
    with watched_page(browser) as opened:
        opened.page.goto((site / "index.html").as_uri())
        opened.page.locator("input.md-search__input").click()
        opened.page.keyboard.type("resample-threshold")
        expect(opened.page.locator(".md-search-result__item").first).to_contain_text("train")
        opened.page.locator(".md-search-result__link").first.click()
        expect(opened.page.locator("h1")).to_contain_text("Command line")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "guides/cache", "reference/python", "reference/command-line", "results"])
def test_no_page_is_wider_than_a_phone(name: str, site: Path, browser: Browser) -> None:
    with watched_page(browser) as opened:
        opened.page.set_viewport_size({"width": 390, "height": 844})
        opened.page.goto((site / f"{name}.html").as_uri())
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        loaded = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
        opened.page.wait_for_function(loaded)
