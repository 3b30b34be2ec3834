"""Opening a dashboard in a browser, and reading what its list shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tailrace.pipeline.dashboard.site_data import unpack


def open_list(page: Page, site: Path, choice: str = "") -> None:
    page.goto((site / "index.html").as_uri() + choice)
    expect(page.locator("#list")).to_be_visible()


def open_feature(page: Page, site: Path, feature: int) -> None:
    page.goto((site / "index.html").as_uri() + f"#feature={feature}")
    expect(page.locator("#feature h1")).to_have_text(f"Feature {feature}")


def listed(page: Page) -> list[int]:
    return [int(text) for text in page.locator("#list tbody th a").all_inner_texts()]


def index_of(site: Path) -> dict[str, Any]:
    index: dict[str, Any] = unpack((site / "data" / "index.js").read_bytes())
    return index


def focused(page: Page) -> str:
    text: str = page.evaluate("document.activeElement.textContent.trim()")
    return text
