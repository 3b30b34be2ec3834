"""The page of a circuit in a real browser, opened from disk: seen, walked by keyboard, and nothing complains."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question, parse_feature
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.shared.pages import stated_policy
from tests.pipeline.circuit.test_stage import write_dashboard, write_tables
from tests.support.browsers import accessibility_problems, watched_page
from tests.support.circuit_places import PROMPT, Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit")
    place = Place(folder)
    tables = write_tables(folder / "tables", place.transcoders[2])
    return circuit.run(
        CircuitSettings(branches=8, max_features=60, order="magnitude"),
        Question(PROMPT, feature=parse_feature(place.active_feature())),
        transcoders=place.transcoders,
        output=folder / "out",
        tables=[tables],
        dashboard=write_dashboard(folder / "a site", tables),
        model=str(place.model_path),
    ).path


@pytest.fixture
def page(browser: Browser, out: Path) -> Iterator[Page]:
    with watched_page(browser) as watched:
        watched.page.goto((out / "index.html").as_uri())
        expect(watched.page.locator(".node").first).to_be_visible()
        yield watched.page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_nothing_is_inaccessible_or_wider_than_the_screen(browser: Browser, out: Path, width, scheme) -> None:
    with watched_page(browser, scheme) as watched:
        watched.page.set_viewport_size({"width": width, "height": 844})
        watched.page.goto((out / "index.html").as_uri())
        watched.page.locator(".node").first.focus()
        assert accessibility_problems(watched.page) == []
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        expect(watched.page.get_by_text("Tap a node")).to_be_visible(visible=width == 390)
        expect(watched.page.get_by_text("Point at a node")).to_be_visible(visible=width == 1360)


def test_the_page_opens_on_the_question_and_what_the_answer_is_made_of(page: Page) -> None:
    expect(page.locator("h1")).to_have_text(
        re.compile(r"^Why does feature \d+ of layer 2 fire at 'what' in 'the man was .*'\?$")
    )
    expect(page.locator("#details h2")).to_have_text(re.compile(r"^Layer 2, feature \d+ at 'what'$"))
    expect(page.locator("#details")).to_contain_text("What it is made of")
    assert page.locator(".bar .sum").count() == page.locator(".sums li").count() > 1


def test_pointing_near_a_node_shows_what_it_is_made_of_and_choosing_keeps_it(page: Page) -> None:
    last = page.locator(".node:not(.beside)").last
    name = (last.get_attribute("aria-label") or "").rpartition(",")[0]
    box = last.locator(".shape").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] + 5  # beside the mark, within reach
    page.mouse.move(x, y)
    expect(page.locator("#details h2")).to_have_text(name)
    assert page.locator(".near .edge").count() >= 1
    page.mouse.click(x, y)
    page.mouse.move(5, 5)
    expect(page.locator("#details h2")).to_have_text(name)
    expect(last).to_have_attribute("aria-pressed", "true")


def test_a_card_links_to_the_page_of_its_feature(page: Page, out: Path) -> None:
    link = page.locator("#details a")
    number = re.search(r"feature (\d+)", page.locator("#details h2").inner_text())
    assert number is not None
    site = (out.parent / "a site/index.html").as_uri()
    assert link.evaluate("one => one.href") == f"{site}#feature={number[1]}"


def test_only_the_strongest_lines_are_drawn_and_all_of_the_node_pointed_at(browser: Browser, out: Path) -> None:
    """With a limit of two lines, as a graph of thousands has one of 150."""
    page = (out / "index.html").read_text()
    page = page.replace(stated_policy(page), "default-src 'unsafe-inline' data:")  # it has the hash of another script
    (out / "few.html").write_text(page.replace("const N_LINES = 150;", "const N_LINES = 2;"))
    with watched_page(browser) as watched:
        watched.page.goto((out / "few.html").as_uri())
        expect(watched.page.locator(".edges .edge:not(.beside)")).to_have_count(2)
        expect(watched.page.locator("#drawn")).to_contain_text("The strongest 2 of ")
        watched.page.locator(".node").first.focus()
        assert watched.page.locator(".near .edge").count() > 2


def test_a_path_lights_its_nodes(page: Page) -> None:
    path = page.locator("#paths ol").last.locator("li").first
    n_steps = (path.text_content() or "").count("←")
    path.hover()
    expect(page.locator(".node.lit")).to_have_count(n_steps + 1)
    expect(page.locator(".near .edge")).to_have_count(n_steps)
    page.mouse.move(5, 5)
    expect(page.locator(".node.lit")).to_have_count(0)


def test_every_node_is_reached_by_tab_and_chosen_by_enter(page: Page) -> None:
    page.locator("#graph").focus()
    reached = []
    for _ in range(page.locator(".node:not(.beside)").count()):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert reached == [node.get_attribute("aria-label") for node in page.locator(".node:not(.beside)").all()]
    page.keyboard.press("Enter")
    expect(page.locator(".node:not(.beside)").last).to_have_attribute("aria-pressed", "true")


def test_the_view_moves_zooms_and_comes_back(page: Page) -> None:
    graph = page.locator("#graph")
    whole = graph.get_attribute("viewBox")
    graph.focus()
    page.keyboard.press("+")
    zoomed = graph.get_attribute("viewBox")
    assert zoomed != whole
    page.keyboard.press("ArrowRight")
    assert graph.get_attribute("viewBox") != zoomed
    page.keyboard.press("0")
    expect(graph).to_have_attribute("viewBox", str(whole))
    graph.hover()
    page.mouse.wheel(0, -300)
    assert graph.get_attribute("viewBox") != whole


def test_what_paths_leave_out_is_shown_when_asked_for(page: Page) -> None:
    beside = page.locator(".node.beside")
    expect(beside.first).to_be_hidden()
    page.get_by_role("button", name="Errors, biases and what was left out").click()
    expect(beside.first).to_be_visible()
    expect(page.locator(".node").first).to_be_visible()


def test_both_graphs_can_be_chosen(page: Page) -> None:
    button = page.get_by_role("button", name="Attribution graph")
    beside = page.get_by_role("button", name="Errors, biases and what was left out")
    expect(beside).to_be_visible()
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".node.embedding").first).to_be_visible()
    expect(beside).to_be_hidden()  # nothing lies beside the nodes of an attribution graph


def test_labels_are_never_small_nor_over_each_other_and_more_are_shown_nearer(page: Page) -> None:
    page.get_by_role("button", name="Attribution graph").click()
    graph = page.locator("#graph")

    def shown() -> list[dict[str, float]]:
        boxes = "all => all.filter((one) => one.textContent).map((one) => one.getBoundingClientRect().toJSON())"
        return page.eval_on_selector_all(".label", boxes)

    whole = shown()
    assert whole
    graph.focus()
    for _ in range(24):
        page.keyboard.press("-")
    far = shown()
    assert 1 <= len(far) <= len(whole)
    for boxes in (whole, far):
        assert min(box["height"] for box in boxes) >= 11
        for one, other in itertools.combinations(boxes, 2):
            meet = one["left"] < other["right"] and other["left"] < one["right"]
            assert not (meet and one["top"] < other["bottom"] - 3 and other["top"] < one["bottom"] - 3)
