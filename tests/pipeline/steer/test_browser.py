"""The page of steered texts in a real browser: readable on a phone and at a desk, in light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailrace.pipeline.steer.page import page
from tests.pipeline.steer.test_steer import made_up
from tests.support.browsers import Scheme, accessibility_problems, open_browser, watched_page


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_a_desk_and_can_be_read_by_all(tmp_path: Path, scheme: Scheme) -> None:
    (tmp_path / "page.html").write_text(page(made_up()))
    with open_browser() as browser, watched_page(browser, scheme) as watched:
        for width in (390, 1360):
            watched.page.set_viewport_size({"width": width, "height": 900})
            watched.page.goto((tmp_path / "page.html").as_uri())
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
            assert accessibility_problems(watched.page) == []
            first, second = (
                one.bounding_box() for one in watched.page.locator(".texts").first.locator("article").all()
            )
            assert first is not None
            assert second is not None
            assert (first["y"] == second["y"]) == (width > 400)  # side by side where there is room
        watched.page.locator("summary").first.click()
        assert watched.page.get_by_text("1/0, for 3:5=+30").first.is_visible()
