"""A blind page shows where a feature fires, safely, and nothing that tells whose feature it is."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tailrace.analysis.dashboards.values import visible_token
from tailrace.pipeline.dashboard.blind import HOT_SHADE, N_SHADES, shade_of, write_blind_page


def example(
    tokens: list[str], activations: list[float | None], here: int, kind: str = "top", band: int | None = None
) -> dict[str, Any]:
    return {
        "feature": 7391,
        "kind": kind,
        "band": band,
        "rank": 0,
        "activation": activations[here],
        "row": 55123,
        "context": 8642,
        "position": here,
        "document": 97531,
        "window_start": 0,
        "window_tokens": tokens,
        "window_activations": activations,
    }


TOP = example(["<s>", " the", " March", " wind"], [None, 0.0, 8.5, 2.125], 2)
STRONG = example([" March", " May"], [8.5, 8.0], 1, kind="band", band=4)
BAND = example([" a", " May", " be"], [0.0, 1.0625, 0.0], 1, kind="band", band=0)


def written(folder: Path, examples: list[dict[str, Any]], largest: float | None = 8.5, **options: Any) -> str:
    write_blind_page(folder / "page.html", {"feature": 7391, "max": largest}, examples, 12, **options)
    return (folder / "page.html").read_text()


class Elements(HTMLParser):
    """The tags, and the texts of the tokens, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self._class: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs).get("class") or ""
        self._class = given if given.split()[:1] == ["token"] else None
        if self._class is not None:
            self.tokens.append((self._class, ""))

    def handle_data(self, data: str) -> None:
        if self._class is not None:
            name, text = self.tokens[-1]
            self.tokens[-1] = (name, text + data)

    def handle_endtag(self, tag: str) -> None:
        self._class = None


def test_the_page_shows_the_item_and_its_sections(tmp_path: Path) -> None:
    page = written(tmp_path, [TOP, STRONG, BAND])
    assert re.findall(r"<h1>(.*?)</h1>", page) == ["Item 12"]
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Strongest examples",
        "Examples from the strongest fifth of the range",
        "Examples from the weakest fifth of the range",
    ]
    assert Elements(page).tokens[:4] == [
        ("token", "<s>"),
        ("token", " the"),
        ("token here fires s20 hot", " March"),
        ("token fires s5", " wind"),
    ]


def test_bands_other_than_fifths_are_counted(tmp_path: Path) -> None:
    examples = [example([" a"], [1.0], 0, kind="band", band=band) for band in (0, 2)]
    assert re.findall(r"<h2>(.*?)</h2>", written(tmp_path, examples))[1:] == [
        "Examples from part 3 of 3 of the range, counted from the weakest",
        "Examples from part 1 of 3 of the range, counted from the weakest",
    ]


def test_no_number_of_the_feature_is_in_the_source(tmp_path: Path) -> None:
    body = written(tmp_path, [TOP, STRONG, BAND]).partition("<body>")[2]
    without_shades = re.sub(r" s\d+", "", body)
    assert re.findall(r"\d+", without_shades) == ["1", "12", "1", *"222222"]  # Item 12, and the tags h1 and h2
    assert not re.search(r"7391|55123|8642|97531|8\.5|2\.125", body)


def test_text_of_tokens_cannot_leave_its_element(tmp_path: Path) -> None:
    hostile = ["</script>", "<img src=x onerror=alert(1)>", '" class="x', "&amp;", "a\nb", "\u202e", "�"]
    found = Elements(written(tmp_path, [example(hostile, [0.0] * 7, 3)]))
    assert [text for _, text in found.tokens] == [
        "</script>",
        "<img src=x onerror=alert(1)>",
        '" class="x',
        "&amp;",
        "a⏎b",
        "[U+202E]",
        "�",
    ]
    assert {"img", "script"}.isdisjoint(found.tags)


def test_the_window_is_symmetrical_and_ends_with_the_text(tmp_path: Path) -> None:
    tokens = [f"t{place}" for place in range(9)]
    shown = Elements(written(tmp_path, [example(tokens, [0.0] * 9, 4)], window=2)).tokens
    assert [text for _, text in shown] == ["t2", "t3", "t4", "t5", "t6"]
    shown = Elements(written(tmp_path, [example(tokens, [0.0] * 9, 1)], window=3)).tokens
    assert [text for _, text in shown] == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize(
    ("activation", "largest", "shade"),
    [(0.0, 8.0, 0), (None, 8.0, 0), (1e-9, 8.0, 1), (4.0, 8.0, 10), (8.0, 8.0, N_SHADES), (9.0, 8.0, N_SHADES)],
)
def test_shades_are_linear_from_zero_to_the_largest_activation(
    activation: float | None, largest: float, shade: int
) -> None:
    assert shade_of(activation, largest) == shade


def test_a_feature_without_a_largest_activation_is_not_coloured(tmp_path: Path) -> None:
    assert shade_of(0.0, 0.0) == 0
    page = written(tmp_path, [], largest=None)
    assert "There are none." in html.unescape(page)


def test_the_hot_shade_is_where_the_site_turns_text_black() -> None:
    assert HOT_SHADE / N_SHADES == 0.65


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" word", " word"),
        ("  ", "␣␣"),
        ("", "◌"),
        ("\n\n", "⏎⏎"),
        ("\ta", "⇥a"),
        ("\u200b", "[U+200B]"),
        ("\xa0", "[U+00A0]"),
        ("\x07", "[U+0007]"),
        ("é", "é"),
    ],
)
def test_every_character_of_a_token_can_be_seen(text: str, shown: str) -> None:
    assert visible_token(text) == shown
