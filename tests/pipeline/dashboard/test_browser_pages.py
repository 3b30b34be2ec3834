"""Pages of features in a real browser: what they show, by mouse, keyboard and address, and axe-core's judgement."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.serve import open_server
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.dashboard.site_data import unpack
from tests.support import dashboard_fixtures
from tests.support.browsers import Scheme, accessibility_problems, watched_page
from tests.support.dashboard_fixtures import D_SAE
from tests.support.dashboard_tables import DEAD, MadeTables, make_tables
from tests.support.dashboard_visits import index_of, open_feature, open_list

pytestmark = pytest.mark.slow


made, site, page = dashboard_fixtures.made, dashboard_fixtures.site, dashboard_fixtures.page


def test_a_link_opens_a_feature_and_a_wrong_one_is_told(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    assert page.title() == "Feature 12: tiny<b>lm layer1"
    for wrong in ("999", "x", "-1"):
        page.goto((site / "index.html").as_uri() + f"#feature={wrong}")
        expect(page.locator("#notice")).to_contain_text(f"This site has no feature {wrong}: it has features 0 to 69.")


def test_a_file_that_is_missing_is_named(browser: Browser, site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "cut")
    (tmp_path / "cut" / "data" / "features-000032.js").unlink()
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "cut" / "index.html").as_uri() + "#feature=40")
    expect(page.locator("#notice")).to_contain_text("data/features-000032.js is not there")
    context.close()


def test_a_page_shows_what_its_record_says(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    records = unpack((site / "data" / "features-000000.js").read_bytes())
    record, texts = records["features"][12], records["vocabulary"]
    expect(page.locator("#feature")).to_contain_text(f"{record['statistics']['n_active']} tokens")
    bands = page.locator("details.band summary").all_inner_texts()
    assert [float(re.findall(r"[\d.]+", title)[1]) for title in bands] == [
        float(f"{band['high']:.3g}") for band in record["bands"]
    ]
    assert not any("≈" in title for title in bands)
    first = page.locator("section", has_text="Strongest examples").locator("li").first
    length = record["examples"]["length"][0]
    assert first.locator(".token").all_text_contents() == [texts[at] for at in record["examples"]["tokens"][:length]]
    assert first.locator(".token.here").count() == 1
    headings = page.locator("#feature h2").all_inner_texts()
    assert headings == [
        *(
            "Strongest examples",
            "By strength in bands",
            "Random examples",
            "Activations",
            "Output tokens",
            "Input tokens",
        ),
        *("Nearest decoders", "Fires together with", "Frequency by position", "Later features", "Attention heads"),
    ]


def test_colours_run_linearly_from_white_to_orange(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    largest = index_of(site)["max"][12]
    tokens = page.locator(".token.fires")
    assert tokens.count() > 20
    for place in range(0, tokens.count(), 7):
        token = tokens.nth(place)
        red, green, blue, *opacity = (
            float(part)
            for part in re.findall(r"[\d.]+", token.evaluate("one => getComputedStyle(one).backgroundColor"))
        )
        assert (red, green, blue) == (255, 140, 0)
        share = float(token.get_attribute("data-tip") or "") / largest
        assert (opacity or [1.0])[0] == pytest.approx(min(1.0, max(0.04, share)), abs=0.006)


def tooltip(page: Page) -> Locator:
    return page.get_by_role("tooltip")


def test_values_are_shown_by_pointing_and_by_keyboard(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    here = page.locator(".token.here").first
    here.hover()
    expect(tooltip(page)).to_have_text(here.get_attribute("data-tip") or "none")
    page.mouse.move(2, 2)
    expect(tooltip(page)).to_be_hidden()
    button = page.locator("button.value").first
    assert button.inner_text() == here.get_attribute("data-tip")
    button.focus()
    page.keyboard.press("ArrowRight")
    after = page.locator("li.example").first.locator(".after .token").first
    expect(after).to_have_class(re.compile("cursor"))
    expect(tooltip(page)).to_have_text(after.get_attribute("data-tip") or "none")
    expect(page.locator("#spoken")).to_contain_text(after.text_content() or "none")
    page.keyboard.press("Escape")
    expect(tooltip(page)).to_be_hidden()
    page.locator("rect.column").first.hover()
    expect(tooltip(page)).to_contain_text("token")


def test_an_example_opens_to_its_whole_passage(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    button, item = page.locator("button.value").first, page.locator("li.example").first
    before = item.bounding_box()
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(item).to_have_class(re.compile("whole"))
    button.click()
    expect(button).to_have_attribute("aria-expanded", "false")
    assert item.bounding_box() == before


def test_examples_wrap_at_the_ends_of_lines_as_code(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    items = page.locator("li.example")
    assert "whole" not in (items.first.get_attribute("class") or "")
    page.get_by_role("radio", name="passages").check()
    assert page.locator("li.example.whole").count() == items.count()
    ended = page.locator(".window", has=page.locator(".eol")).first
    height = (ended.bounding_box() or {"height": 0})["height"]
    page.get_by_role("radio", name="code").check()
    assert "monospace" in ended.evaluate("one => getComputedStyle(one).fontFamily")
    n_ends = ended.locator(".eol").count()
    assert (ended.bounding_box() or {"height": 0})["height"] >= 20 * (n_ends + 1) > 20
    assert height > 0
    page.keyboard.press("j")  # the choice is kept from page to page
    expect(page.locator("#feature h1")).not_to_have_text("Feature 12")
    expect(page.get_by_role("radio", name="code")).to_be_checked()
    assert page.locator("li.example.whole").count() == items.count()


def test_a_character_that_tokens_share_is_one_box(page: Page) -> None:
    found = page.evaluate(
        """() => {
            const packed = {
                tokens: [1, 0, 2, 0, 3, 0, 1, 0], length: [6, 2], before: [1, 1],
                fires: [1, 3], values: [2.5, 0.5], unread: [5], kind: ["top", "top"], band: [null, null],
                activation: [2.5, 0], document: [0, 0], context: [0, 0], position: [1, 1],
            };
            const examples = Examples.unpack(packed, ["◌", "a", "日b", "é"]);
            const told = (token) => [token.text, token.activation, Examples.tip(token)];
            return examples.map(({ tokens, here }) => [here, tokens.map(told)]);
        }"""
    )
    assert found == [
        [
            1,
            [
                ["a", 0, "0"],
                ["日b", 2.5, "日: bytes E6 97 A5 in 2 tokens: 2.50, 0"],
                ["é", 0.5, "é: bytes C3 A9 in 2 tokens: 0.500, 0"],
                ["◌", None, "not read"],  # the window ends in the middle of a character
            ],
        ],
        [1, [["a", 0, "0"], ["◌", 0, "0"]]],
    ]


def test_few_documents_are_warned_of(page: Page, site: Path, browser: Browser, tmp_path: Path) -> None:
    open_feature(page, site, 12)
    assert page.locator(".warning").count() == 0
    few = make_tables(tmp_path / "tables", n_documents=2).path
    few_site = dashboard.run(DashboardSettings(feature=("12",)), tables=few, output=tmp_path / "site", quiet=True).path
    with watched_page(browser) as watched:
        open_feature(watched.page, few_site, 12)
        expect(watched.page.locator(".warning")).to_contain_text("From 2 documents only (0, 1)")


def test_a_dead_feature_leads_on_and_says_what_is_known(page: Page, site: Path) -> None:
    open_feature(page, site, DEAD)
    expect(page.locator(".dead")).to_contain_text("above zero on none of the 1,280 tokens analysed")
    expect(page.locator(".dead")).to_contain_text("encoder bias is −0.250 and its encoder norm 1.50")
    expect(page.locator(".dead")).to_contain_text("the input's component along the encoder row exceeds 0.167")
    expect(page.locator("a[rel=prev]")).to_contain_text(f" {DEAD - 1}")
    expect(page.locator("a[rel=next]")).to_contain_text(f"{DEAD + 1} ")


def test_activations_have_an_axis_of_tokens_and_a_unit(page: Page, site: Path) -> None:
    open_feature(page, site, 12)
    records = unpack((site / "data" / "features-000000.js").read_bytes())
    labels = page.locator("section", has_text="Activations").locator("svg .label").all_text_contents()
    assert labels[-4:] == [
        "tokens",
        f"{max(records['features'][12]['histogram']['counts'])}",
        "0",
        "activation, log scale",
    ]


CONTROLS = "a[href], button, input, summary, [tabindex='0']"


@pytest.mark.parametrize("feature", [None, 12])
def test_every_control_is_reached_by_tab_in_the_order_seen(page: Page, site: Path, feature: int | None) -> None:
    if feature is not None:
        open_feature(page, site, feature)
    wanted: int = page.evaluate(
        """selector => {
            const seen = [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility());
            // of radio buttons Tab reaches the one that is chosen, arrow keys the others
            const reached = seen.filter((one) => one.type !== "radio" || one.checked);
            reached.forEach((one, place) => { one.dataset.order = place; });
            reached[0].focus();
            return reached.length;
        }""",
        CONTROLS,
    )
    order = ["0"]
    for _ in range((wanted if feature is not None else 16) - 1):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.dataset.order"))
    assert order == [str(place) for place in range(len(order))]
    assert wanted > 15
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus is seen"


def test_hostile_tokens_are_text_wherever_they_appear(page: Page, site: Path) -> None:
    scripts = page.locator("main script, main img").count()
    for feature in range(12):
        open_feature(page, site, feature)
        scripts += page.locator("main script, main img, main b").count()
    assert scripts == 0
    assert page.locator(".chip", has_text="<img src=x onerror=alert(1)>").count() > 0
    assert "[U+202E]evil" in (page.locator("#feature").text_content() or "")


def test_tables_with_nothing_more_give_pages_with_less(browser: Browser, tmp_path: Path) -> None:
    bare = make_tables(tmp_path / "tables", d_sae=8, parts=())
    site = dashboard.run(DashboardSettings(), tables=bare.path, output=tmp_path / "site", quiet=True).path
    with watched_page(browser) as watched:
        open_list(watched.page, site)
        assert watched.page.get_by_role("columnheader", name="promotes").count() == 0
        open_feature(watched.page, site, 1)
        assert watched.page.locator("#feature h2").all_inner_texts() == ["Strongest examples", "Activations"]
        open_feature(watched.page, site, DEAD)
        expect(watched.page.locator("#feature")).to_contain_text("above zero on none of the 1,280 tokens analysed")


def test_numbers_that_are_not_known_are_not_told(browser: Browser, tmp_path: Path) -> None:
    made = make_tables(tmp_path / "tables", parts={"extras"})
    site = dashboard.run(DashboardSettings(), tables=made.path, output=tmp_path / "site", quiet=True).path
    with watched_page(browser) as watched:
        open_feature(watched.page, site, DEAD)
        numbers = watched.page.locator("#feature .statistics")
        expect(numbers).to_contain_text("median–")
        expect(numbers).not_to_contain_text("p90")
        expect(numbers).not_to_contain_text("distinct tokens")
        expect(numbers).to_contain_text("decoder norm")


def test_a_site_made_from_tables_as_it_is_looked_at_is_the_same_over_http(browser: Browser, made: MadeTables) -> None:
    with open_server(made.path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            with watched_page(browser, origin=address) as watched:
                watched.page.goto(f"{address}#feature=40")
                expect(watched.page.locator("#feature h1")).to_have_text("Feature 40")
                watched.page.get_by_role("link", name="all features").click()
                expect(watched.page.get_by_role("status")).to_have_text(f"{D_SAE - 1} of {D_SAE} features")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("width", [1360, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, site: Path, scheme: Scheme, width: int) -> None:
    with watched_page(browser, scheme, width=width) as watched:
        page = watched.page
        open_list(page, site, "#show=all&q=mar")
        expect(page.locator("#list mark").first).to_be_visible()
        if width == 390:
            page.get_by_role("button", name="filters").click()
        assert accessibility_problems(page) == []
        open_feature(page, site, 12)
        assert accessibility_problems(page) == []
        page.locator("details.wide summary").click()
        page.get_by_role("radio", name="code").check()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_be_visible()
        assert accessibility_problems(page) == []
        page.keyboard.press("Escape")
        open_feature(page, site, DEAD)
        assert accessibility_problems(page) == []
        page.goto((site / "index.html").as_uri() + "#feature=999")
        expect(page.locator("#notice")).to_be_visible()
        assert accessibility_problems(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_blind_pages(browser: Browser, made: MadeTables, tmp_path: Path, scheme: Scheme) -> None:
    settings = DashboardSettings(blind=True, feature=("0-5",))
    site = dashboard.run(settings, tables=made.path, output=tmp_path / "site", quiet=True).path
    with watched_page(browser, scheme) as watched:
        for name in ("index.html", "item-0001.html", "item-0002.html"):
            watched.page.goto((site / name).as_uri())
            assert accessibility_problems(watched.page) == []


def test_axe_would_find_a_problem(browser: Browser, site: Path) -> None:
    with watched_page(browser) as watched:
        open_list(watched.page, site)
        watched.page.evaluate(
            "document.querySelector('label[for=search]').remove(); document.querySelector('#search').placeholder = ''"
        )
        assert any(problem.startswith("label:") for problem in accessibility_problems(watched.page))
