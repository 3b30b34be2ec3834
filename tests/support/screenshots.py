"""Screenshots of every page, for the docs: ``python -m tests.support.screenshots DEMO`` after ``make demo``.

Pages are made below ``DEMO/pages`` from the demo's transcoder and tables, a sweep of three, and a small transcoder of
every layer; what is there already is taken as it is. Pictures go to ``docs/images``: look at each before it is kept.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize

from tailrace.pipeline import cli
from tailrace.pipeline.samples.bundled_models import bundled_model
from tests.support.browsers import Scheme, open_browser

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DESK: ViewportSize = {"width": 1200, "height": 760}
PHONE: ViewportSize = {"width": 390, "height": 760}
TEXT = "The people of this country have every reason to be proud of what they have done"


class Shot(NamedTuple):
    """A picture of a page."""

    name: str
    page: str
    """Below the folder of pages, with what follows the address."""
    scheme: Scheme = "light"
    is_phone: bool = False
    press: str | None = None
    """Button to press before."""


SHOTS = (
    Shot("page-list", "dashboard/index.html"),
    Shot("page-feature", "dashboard/index.html#feature=85"),
    Shot("page-list-phone", "dashboard/index.html", "dark", is_phone=True),
    Shot("page-score", "score.html"),
    Shot("page-pareto", "pareto.html", "dark"),
    Shot("page-compare", "compare.html", press="φ of firing"),
    Shot("page-steer", "steer.html"),
    Shot("page-curves", "curves.html"),
    Shot("page-circuit", "circuit/index.html"),
    Shot("page-circuit-graph", "circuit/index.html", "dark", press="Attribution graph"),
)


def make_pages(demo: Path) -> Path:
    """Make every page from the artifacts of ``pipeline demo``; return their folder."""
    own, pages, model = demo / "tiny-layer2", demo / "pages", bundled_model("tiny-lm")
    asked = ["--transcoders", own / "transcoder", "--tables", own / "tables"]
    layers = pages / "layers" / "circuits"
    runs = [pages / "sweep" / "runs" / f"k={k},architecture=topk" for k in (16, 32)]
    small = ["--tokens", 40_000, "--d-sae", 512, "--k", 16, "--steps", 300, "--batch-rows", 1024]
    commands: list[list[object]] = [
        ["dashboard", own / "tables", "--out", pages / "dashboard"],
        ["score", TEXT, *asked, "--dashboard", pages / "dashboard", "--out", pages / "score.html"],
        ["steer", "The people of this country", *asked, "--feature", "1647=+50", "--out", pages / "steer.html"],
        ["train", own / "cache", "--d-sae", 1024, "--steps", 60, "--sweep", "k=8,16,32,64",
         "--sweep", "architecture=topk,batch_topk", "--out", pages / "sweep"],
        ["pareto", pages / "sweep", "--out", pages / "pareto.html"],
        ["curves", pages / "sweep", "--out", pages / "curves.html"],
        ["analyze", *runs, "--cache", own / "cache", "--model", model, "--out", pages / "tables"],
        ["compare", *(pages / "tables" / run.name for run in runs), "--transcoders", runs[0].parent,
         "--out", pages / "compare.html"],
        ["circuits-model", "--model", model, "--dataset", demo / "speeches.jsonl", *small, "--out", pages / "layers"],
        ["analyze", layers / "transcoders", "--cache", layers / "cache", "--model", model, "--out", layers / "tables"],
        ["circuit", "The people of the United", "--logit", " States", "--transcoders", layers / "transcoders",
         "--tables", layers / "tables", "--model", model, "--out", pages / "circuit"],
    ]  # fmt: skip
    for command in commands:
        cli.main([str(part) for part in command])
    return pages


def take(browser: Browser, pages: Path, shot: Shot) -> bytes:
    """Return a picture as a PNG of few colours, which is a third as large."""
    context = browser.new_context(
        color_scheme=shot.scheme, viewport=PHONE if shot.is_phone else DESK, has_touch=shot.is_phone
    )
    try:
        page: Page = context.new_page()
        path, _, fragment = shot.page.partition("#")
        page.goto((pages / path).as_uri() + (f"#{fragment}" if fragment else ""))
        if shot.press is not None:
            page.get_by_role("button", name=shot.press).click()
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot()))
    finally:
        context.close()
    small = io.BytesIO()
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main(arguments: list[str]) -> None:
    """Make the pages of a demo, and a picture of each."""
    pages = make_pages(Path(arguments[0]).resolve())
    with open_browser() as browser:
        for shot in SHOTS:
            (IMAGES / f"{shot.name}.png").write_bytes(take(browser, pages, shot))


if __name__ == "__main__":
    main(sys.argv[1:])
