"""The page of a circuit in a real browser, opened from disk: seen, walked by keyboard, and nothing complains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question, parse_feature
from tailrace.pipeline.circuit.settings import CircuitSettings
from tests.pipeline.circuit.test_stage import write_tables
from tests.support.browsers import accessibility_problems, open_browser, watched_page
from tests.support.circuit_places import PROMPT, Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit")
    place = Place(folder)
    return circuit.run(
        CircuitSettings(branches=8, max_features=60, order="magnitude"),
        Question(PROMPT, feature=parse_feature(place.active_feature())),
        transcoders=place.transcoders,
        output=folder / "out",
        tables=[write_tables(folder / "tables", place.transcoders[2])],
        model=str(place.model_path),
    ).path


@pytest.fixture
def page(browser: Browser, out: Path) -> Iterator[Page]:
    with watched_page(browser) as watched:
        watched.page.goto((out / "index.html").as_uri())
        expect(watched.page.locator(".node").first).to_be_visible()
        yield watched.page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_inaccessible(browser: Browser, out: Path, scheme) -> None:
    with watched_page(browser, scheme) as watched:
        watched.page.goto((out / "index.html").as_uri())
        watched.page.locator(".node").first.focus()
        assert accessibility_problems(watched.page) == []


def test_pointing_at_a_node_shows_what_it_is_made_of_and_choosing_keeps_it(page: Page) -> None:
    root = page.locator(".node").first
    name = (root.get_attribute("aria-label") or "").partition(",")[0]
    root.hover()
    expect(page.locator("#details h2")).to_have_text(name)
    expect(page.locator("#details")).to_contain_text("What it is made of")
    assert page.locator(".edge.near").count() > 1
    root.click()
    page.mouse.move(5, 5)
    expect(page.locator("#details h2")).to_have_text(name)
    expect(root).to_have_attribute("aria-pressed", "true")


def test_every_node_is_reached_by_tab_and_chosen_by_enter(page: Page) -> None:
    page.locator("#graph").focus()
    reached = []
    for _ in range(page.locator(".node").count()):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert reached == [node.get_attribute("aria-label") for node in page.locator(".node").all()]
    page.keyboard.press("Enter")
    expect(page.locator(".node").last).to_have_attribute("aria-pressed", "true")


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


def test_what_paths_leave_out_can_be_hidden(page: Page) -> None:
    beside = page.locator(".node.beside")
    expect(beside.first).to_be_visible()
    page.get_by_role("button", name="Errors, biases and what was left out").click()
    expect(beside.first).to_be_hidden()
    expect(page.locator(".node").first).to_be_visible()


def test_both_graphs_can_be_chosen(page: Page) -> None:
    button = page.get_by_role("button", name="Attribution graph")
    beside = page.get_by_role("button", name="Errors, biases and what was left out")
    expect(beside).to_be_visible()
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".node.embedding").first).to_be_visible()
    expect(beside).to_be_hidden()  # nothing lies beside the nodes of an attribution graph


def test_labels_are_longer_nearer_and_numbers_are_whole_or_left_out(page: Page) -> None:
    graph, labels = page.locator("#graph"), page.locator(".label")

    def shown() -> list[str]:
        return [text for text in labels.all_text_contents() if text]

    whole = shown()
    assert whole
    graph.focus()
    for _ in range(12):
        page.keyboard.press("+")
    near = shown()
    assert len(near) >= len(whole)
    assert not any("…" in text for text in near)
    for _ in range(24):
        page.keyboard.press("-")
    assert not any(text.startswith("#") and "…" in text for text in shown())
