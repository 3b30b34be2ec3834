"""Pages in Firefox: they draw, search, lead on and show definitions, and no script fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import dashboard_fixtures
from tests.support.dashboard_tables import DEAD
from tests.support.dashboard_visits import index_of
from tests.support.firefox import Firefox, open_firefox

pytestmark = pytest.mark.slow

made, site = dashboard_fixtures.made, dashboard_fixtures.site


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    with open_firefox(tmp_path_factory.mktemp("firefox") / "profile") as opened:
        yield opened


def texts(firefox: Firefox, selector: str) -> list[str]:
    found: list[str] = firefox.run(f"return [...document.querySelectorAll({selector!r})].map((one) => one.textContent)")
    return found


def type_into_search(firefox: Firefox, text: str) -> None:
    firefox.run(
        f"const search = document.querySelector('#search'); search.value = {text!r}; "
        "search.dispatchEvent(new Event('input'))"
    )


def test_the_list_draws_searches_and_defines_its_words(firefox: Firefox, site: Path) -> None:
    firefox.open((site / "index.html").as_uri())
    firefox.wait_for("document.querySelector('#list tbody tr[data-place]')")
    interest = index_of(site)["interest"]
    first = max(range(len(interest)), key=lambda feature: (interest[feature] or 0, -feature))
    assert texts(firefox, "#list tbody th a")[0] == str(first)
    type_into_search(firefox, "april march")  # which only the file of passages has
    firefox.wait_for("document.querySelector('#list .snippet mark')")
    firefox.run("document.querySelector('.facts [data-word=FVU]').click()")
    assert texts(firefox, "#tooltip")[0].startswith("Fraction of variance unexplained")
    assert firefox.complaints() == []


def test_a_feature_draws_leads_on_and_folds_its_heads(firefox: Firefox, site: Path) -> None:
    firefox.open((site / "index.html").as_uri() + "#feature=12")
    firefox.wait_for("document.querySelector('#feature h1')?.textContent === 'Feature 12'")
    assert len(texts(firefox, ".example .token.fires")) > 20
    assert "Activations" in texts(firefox, "#feature h2")
    assert firefox.run("return document.querySelector('details.wide').open") is False
    following = firefox.run("return new URL(document.querySelector('a[rel=next]').href).hash.split('=')[1]")
    firefox.run("document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'j', bubbles: true }))")
    firefox.wait_for(f"document.querySelector('#feature h1').textContent === 'Feature {following}'")
    assert firefox.complaints() == []


def test_a_dead_feature_says_why(firefox: Firefox, site: Path) -> None:
    firefox.open((site / "index.html").as_uri() + f"#feature={DEAD}")
    firefox.wait_for("document.querySelector('#feature .dead')")
    assert "above zero on none" in texts(firefox, ".dead")[0]
    assert firefox.complaints() == []


def test_a_narrow_window_has_rows_of_two_lines(firefox: Firefox, site: Path) -> None:
    firefox.open((site / "index.html").as_uri(), width=500)  # Firefox makes no narrower one
    firefox.wait_for("document.querySelector('#list tbody tr[data-place]')")
    assert firefox.run("return document.querySelector('#list tbody tr[data-place]').offsetHeight") == 66
    assert firefox.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert firefox.complaints() == []
