"""The rating page in a real browser: every item is shown, rated by keys or by mouse, kept, and saved for the tally."""

from __future__ import annotations

import csv

import pytest
from playwright.sync_api import expect

from tailrace.pipeline.blind import draw
from tailrace.pipeline.blind.settings import DrawSettings
from tests.support.browsers import accessibility_problems, watched_page
from tests.support.tables_by_hand import example_row, feature_row, publish_tables

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("rating")
    features = [feature_row(feature) for feature in range(3)]
    pair = [
        publish_tables(root / name, features, [example_row(feature, 0, size) for feature in range(3)])
        for name, size in (("one", 4.0), ("two", 3.0))
    ]
    return draw.run(DrawSettings(n=2), tables=pair, output=root / "blind").path


def test_ratings_made_in_the_browser_are_those_the_tally_counts(browser, drawn, tmp_path):
    with watched_page(browser) as watched:
        page = watched.page
        page.goto(f"file://{drawn}/rate.html")
        frame = page.frame_locator("#page")
        for item, verdict in enumerate("ymny", start=1):
            expect(frame.locator("h1")).to_have_text(f"Item {item}")  # once the frame has loaded it
            page.keyboard.press(verdict)
            if item == 2:
                page.get_by_label("Context-free").check()
                page.get_by_label("Note").fill('odd, "very" odd')
                page.get_by_role("heading").first.click()
            if item < 4:
                page.get_by_role("button", name="Next").click()
        assert page.locator("#done").inner_text() == "4 of 4 rated"
        assert page.get_by_role("button", name="Next").is_disabled()
        page.reload()  # what was said is still there
        assert page.get_by_label("Yes").is_checked()
        page.get_by_role("button", name="Next").click()
        assert page.get_by_label("Maybe").is_checked()
        assert page.get_by_label("Context-free").is_checked()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save").click()
        download.value.save_as(tmp_path / "ratings.csv")
    rows = list(csv.reader((tmp_path / "ratings.csv").read_text().splitlines()))
    assert rows[2] == ["2", "maybe", "yes", 'odd, "very" odd']
    counted = draw.tally_ratings(drawn, ratings_file=tmp_path / "ratings.csv").tally
    assert sum(one.first.count + one.second.count for one in counted.comparisons if one.name == "yes") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_rating_page_has_no_accessibility_problem_and_is_worked_by_tab(browser, drawn, scheme):
    with watched_page(browser, scheme) as watched:
        page = watched.page
        page.goto(f"file://{drawn}/rate.html")
        page.frame_locator("#page").locator("h1").wait_for()
        assert accessibility_problems(page) == []
        # axe-core asks the frame to look at itself, which pages opened from disk may not; it is looked at below
        watched.complaints[:] = [line for line in watched.complaints if "'postMessage'" not in line]
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        assert {"interpretable", "context_free", "note", "next", "save"} <= reached
    with watched_page(browser, scheme) as watched:
        watched.page.goto(f"file://{drawn}/items/0001.html")
        assert accessibility_problems(watched.page) == []
