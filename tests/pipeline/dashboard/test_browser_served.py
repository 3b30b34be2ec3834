"""A site over several tables in a real browser, as its server shows it: the switch, labels, and a text to try."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, expect

from tailrace.analysis.dashboards.values import visible_token
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.answers import TriedTexts
from tailrace.pipeline.dashboard.serve import open_server
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.storage.labels import LabelEdit, edit_labels, read_labels
from tests.support.browsers import accessibility_problems, watched_page
from tests.support.dashboard_tables import CONTEXT, PARTS, make_tables

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tables"
    for seed, name in enumerate(("layer1", "layer2")):
        make_tables(folder / name, d_sae=20, seed=seed)
    return folder


class Read(TriedTexts):
    """Says without a model that a feature is active on every second token."""

    def __init__(self) -> None:
        pass

    def activations(self, tables: Path, feature: int, text: str) -> dict[str, list[object]]:
        """Return made-up activations."""
        tokens: list[object] = ["<bos>", *text.split()]
        return {"tokens": tokens, "values": [None, *(float(n % 2) * 3 for n in range(1, len(tokens)))]}


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with open_server(folder, port=0, tried=Read()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with watched_page(browser, origin=address) as watched:
        yield watched.page
        if any("409" in line or "400" in line for line in watched.complaints):
            watched.complaints.clear()  # a browser reports every refusal


def open_feature(page: Page, address: str, feature: int, at: str = "layer1") -> None:
    page.goto(f"{address}/?at={at}#feature={feature}")
    expect(page.locator("#feature h1")).to_have_text(f"Feature {feature}")


def test_the_switch_leads_to_other_tables_and_keeps_the_list_as_it_is_chosen(page: Page, address: str) -> None:
    page.goto(f"{address}/#q=march")
    switch = page.locator("select:visible")
    expect(switch).to_have_value("layer1")
    switch.select_option("layer2")
    expect(page).to_have_url(f"{address}/?at=layer2#q=march")
    expect(page.get_by_role("searchbox")).to_have_value("march")
    loaded = page.evaluate("performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in loaded if "/data/layer1/" in name] == []
    open_feature(page, address, 4, "layer2")
    switch.select_option("layer1")
    expect(page).to_have_url(f"{address}/?at=layer1#")
    page.go_back()
    expect(page).to_have_url(f"{address}/?at=layer2#feature=4")
    page.goto(f"{address}/?at=layer9")
    expect(page.locator("#notice")).to_contain_text("This site has no layer9: it has layer1, layer2.")


def test_a_label_is_saved_and_is_in_the_list_at_once(page: Page, address: str, folder: Path) -> None:
    open_feature(page, address, 7)
    page.get_by_label("Label", exact=True).fill("<b>votes</b> 名")
    page.get_by_label("Note").fill("two\nlines")
    page.get_by_role("button", name="star").click()
    expect(page.locator(".live [role=status]").first).to_have_text("saved")
    label = read_labels(folder / "layer1")[7]
    assert (label.label, label.note, label.starred) == ("<b>votes</b> 名", "two\nlines", True)
    page.get_by_role("link", name="all features").click()
    index = page.evaluate("Data.index().then((index) => [index.label[7], index.note[7], index.starred[7]])")
    assert index == ["<b>votes</b> 名", "two\nlines", 1]
    page.reload()
    assert page.evaluate("Data.index().then((index) => index.label[7])") == "<b>votes</b> 名"


def test_who_saves_second_is_shown_what_is_there_and_keeps_what_they_wrote(
    page: Page, address: str, folder: Path
) -> None:
    open_feature(page, address, 8)
    label = page.get_by_label("Label", exact=True)
    label.fill("mine")
    edit_labels(folder / "layer1", [LabelEdit(8, "bob", "theirs")])
    page.get_by_role("button", name="Save").click()
    said = page.locator(".live [role=status]").first
    expect(said).to_contain_text("was edited since you looked at it: bob made it 'theirs'")
    expect(label).to_have_value("mine")
    page.get_by_role("button", name="Show what is there now").click()
    expect(label).to_have_value("theirs")
    label.fill("both")
    page.get_by_role("button", name="Save").click()
    expect(said).to_have_text("saved")
    assert read_labels(folder / "layer1")[8].label == "both"


def test_a_text_that_is_tried_shows_its_tokens_by_activation(page: Page, address: str) -> None:
    open_feature(page, address, 7)
    page.get_by_label("Try a text").fill("one two <script>alert(1)</script> four")
    page.get_by_role("button", name="Try").click()
    expect(page.locator(".tried .token.fires")).to_have_text(["one", "<script>alert(1)</script>"])
    expect(page.locator(".live [role=status]").last).to_have_text("active on 2 of 4 tokens, most on “one”: 3.00")
    page.get_by_label("Try a text").fill(" ")
    page.get_by_role("button", name="Try").click()
    expect(page.locator(".live [role=status]").last).to_contain_text("the text is empty")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forms_and_switch_are_accessible_and_fit_a_phone(browser: Browser, address: str, scheme: str) -> None:
    with watched_page(browser, scheme, address) as watched:  # type: ignore[arg-type]
        open_feature(watched.page, address, 7)
        watched.page.get_by_label("Try a text").fill("one two three")
        watched.page.get_by_role("button", name="Try").click()
        expect(watched.page.locator(".tried .token").first).to_be_visible()
        assert accessibility_problems(watched.page) == []
        watched.page.set_viewport_size({"width": 390, "height": 844})
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_published_site_over_several_opens_from_disk_without_forms(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    site = dashboard.run(DashboardSettings(), tables=folder, output=tmp_path / "a site", quiet=True).path
    with watched_page(browser) as watched:
        watched.page.goto((site / "index.html").as_uri() + "?at=layer2#feature=4")
        expect(watched.page.locator("#feature h1")).to_have_text("Feature 4")
        assert watched.page.locator(".live").count() == 0
        watched.page.locator("select:visible").select_option("layer1")
        expect(watched.page.locator("#list")).to_be_visible()


def test_an_example_opens_the_document_around_it(browser: Browser, tmp_path: Path) -> None:
    made = make_tables(tmp_path / "tables", d_sae=8, parts=PARTS | {"rows"})
    words = pq.read_table(made.path / "rows.parquet")["token"].to_pylist()
    with open_server(made.path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            with watched_page(browser, origin=address) as watched:
                page = watched.page
                page.goto(f"{address}#feature=1")
                item = page.locator("li.example").first
                item.locator("button.origin").click()
                expect(item.locator(".document .here")).to_be_visible()
                assert item.locator(".document .token").count() == 4 * CONTEXT
                context, position = re.findall(r"\d+", item.locator("button.origin").get_attribute("data-tip") or "")[
                    1:3
                ]
                row = int(context) * CONTEXT + int(position)
                assert item.locator(".document .here").text_content() == visible_token(words[row])
                assert float(item.locator(".document .here").get_attribute("data-tip") or "") == pytest.approx(
                    made.activations[row, 1], rel=0.01
                )
                page.mouse.move(0, 0)  # off the button whose tooltip lies outside the landmarks
                assert accessibility_problems(page) == []
                item.locator("button.origin").click()
                expect(item.locator(".document")).to_have_count(0)
        finally:
            server.shutdown()
            thread.join()
