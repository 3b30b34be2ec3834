"""Fixtures of tests that look at a dashboard in a browser.

A module takes them by assignment, ``page = dashboard_fixtures.page``, with all that each needs: an imported name would
be one that every test's argument hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tests.support.browsers import watched_page
from tests.support.dashboard_tables import MadeTables, make_tables
from tests.support.dashboard_visits import open_list

D_SAE = 70


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeTables:
    """Tables of ``D_SAE`` features."""
    return make_tables(tmp_path_factory.mktemp("made") / "tables", d_sae=D_SAE)


@pytest.fixture(scope="module")
def site(made: MadeTables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dashboard of ``made``, below a folder with a space in its name."""
    out = tmp_path_factory.mktemp("site") / "a site"
    return dashboard.run(DashboardSettings(), tables=made.path, output=out, quiet=True).path


@pytest.fixture
def page(browser: Browser, site: Path) -> Iterator[Page]:
    """The list of features, which may neither complain nor ask for anything but its own files."""
    with watched_page(browser) as watched:
        open_list(watched.page, site)
        yield watched.page
