"""Settings of the test session: no network, one thread, the same random examples every time."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
from jaxtyping import install_import_hook

from tests.support import shapes

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Set on import, before any test module imports numpy, torch or datasets: they read these once. Child processes
# inherit them.
_HUB_CACHE = tempfile.TemporaryDirectory(prefix="hub-cache-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HUB_CACHE.name  # neither reads nor fills the developer's own cache
os.environ["TAILRACE_MODELS"] = ""  # nor what a developer's machine remembers of models
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read where a program is defined, and there is no GPU

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

install_import_hook(shapes.MODULES, f"{shapes.__name__}.{shapes.check.__name__}")


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    """Let every test hear what is said once a process, whichever test came before."""
    if compute := sys.modules.get("tailrace.pipeline.shared.compute"):
        compute.say_once.cache_clear()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    from tests.support.browsers import open_browser  # no test without a page loads what drives one

    with open_browser() as opened:
        yield opened
