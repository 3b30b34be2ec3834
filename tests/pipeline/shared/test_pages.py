"""Pages of one file: data cannot become markup; in a browser pages fit, follow the colours and tell numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from tailrace.pipeline.evaluate.pareto import Point, lines
from tailrace.pipeline.evaluate.pareto_plot import write_plot
from tailrace.pipeline.score.pictures import write_scores
from tailrace.pipeline.score.stage import ScoredText, Scores
from tailrace.pipeline.shared.pages import N_SERIES, html_page, json_inside, palette
from tests.support.browsers import Scheme, accessibility_problems, watched_page

WIDTHS = (1360, 390)


def test_data_of_a_page_cannot_end_its_element() -> None:
    hostile = "</script><!--\u2028"
    assert "<" not in json_inside({hostile: hostile})
    assert json.loads(json_inside({hostile: hostile})) == {hostile: hostile}
    assert html_page("<b>", "", data=hostile).count("</script>") == 2
    assert "<title>&lt;b&gt;</title>" in html_page("<b>", "")


def test_every_colour_that_plots_use_has_a_name() -> None:
    assert {"page", "ink", "muted", "line", *(f"series-{index}" for index in range(N_SERIES))} <= set(palette())


def write_pareto(path: Path) -> None:
    kinds = {"batch_topk": 0.0, "topk": 0.02, "jumprelu": 0.05}
    points = [
        Point(f"k={k},architecture={kind}", kind, k, k**-0.5 / 2 + worse, None, 4608, "layer2", "", f"{kind}{k}")
        for kind, worse in kinds.items()
        for k in (8, 16, 32, 64)
    ]
    write_plot(path, lines(points, "fvu"), "fvu")


def write_score(path: Path) -> None:
    tokens = ["<s>", " The", " people", " of", " this", " <b>country</b>", "\n", " have"] * 4
    values = np.linspace(-4, 9, 3 * len(tokens), dtype=np.float32).reshape(len(tokens), 3)
    values[::8] = np.nan
    text = ScoredText(tokens, [0] * len(tokens), ~np.isnan(values[:, 0]), values, [[] for _ in tokens])
    about = {89: {"frequency": 0.01, "max": 9.5, "top_token": " have", "promoted_tokens": [" been", " had"]}}
    write_scores(path, Scores("tiny", "t", "layer2", [89, 7, 1850], True, False, [text, text], about=about))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("write", [write_pareto, write_score])
def test_a_page_fits_the_screen_and_is_accessible(
    browser: Browser, tmp_path: Path, write: Callable[[Path], None], width: int, scheme: Scheme
) -> None:
    write(tmp_path / "page.html")
    with watched_page(browser, scheme) as watched:
        watched.page.set_viewport_size({"width": width, "height": 844})
        watched.page.goto((tmp_path / "page.html").as_uri())
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        paper = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 29)"}[scheme]
        assert accessibility_problems(watched.page) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_mark_of_a_plot_tells_its_numbers_to_mouse_and_keyboard(browser: Browser, tmp_path: Path, width: int) -> None:
    write_pareto(tmp_path / "page.html")
    with watched_page(browser) as watched:
        watched.page.set_viewport_size({"width": width, "height": 844})
        watched.page.goto((tmp_path / "page.html").as_uri())
        marks = watched.page.locator(".plot [data-tip]:visible")
        expect(marks).to_have_count(12)
        tooltip = watched.page.locator("#tooltip")
        marks.nth(5).hover()
        expect(tooltip).to_have_text(marks.nth(5).get_attribute("data-tip") or "", use_inner_text=True)
        watched.page.mouse.move(2, 2)
        expect(tooltip).to_be_hidden()
        watched.page.keyboard.press("Tab")
        expect(tooltip).to_contain_text("k=8")
        sizes = watched.page.eval_on_selector_all(
            ".plot text", "all => all.map((one) => one.getBoundingClientRect().height).filter((height) => height > 0)"
        )
        assert min(sizes) >= 9  # labels are as large on a phone as on a desk


@pytest.mark.slow
def test_a_text_takes_the_colours_of_the_feature_chosen(browser: Browser, tmp_path: Path) -> None:
    write_score(tmp_path / "page.html")
    with watched_page(browser) as watched:
        watched.page.goto((tmp_path / "page.html").as_uri())
        first = watched.page.locator("section").first
        expect(first.locator(".cells")).to_have_count(3)
        expect(first.locator(".cells").first.locator(".cell")).to_have_count(32)
        last = first.locator(".passage .token").last
        before = last.get_attribute("data-tip")
        first.get_by_role("button", name="Feature 1850").click()
        expect(first.get_by_role("button", name="Feature 1850")).to_have_attribute("aria-pressed", "true")
        assert last.get_attribute("data-tip") == "' have' 9"
        assert before != "' have' 9"
        last.hover()
        expect(watched.page.locator("#tooltip")).to_have_text("' have' 9")
        expect(first.locator(".passage b")).to_have_count(0)
