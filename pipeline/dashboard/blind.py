"""A page that shows where a feature fires and nothing that tells whose feature it is.

For comparisons in which a rater must not know which dictionary a feature comes from: no index, statistic, activation
or share is on the page or in its source, for their ranges differ between dictionaries. Shades are one of twenty, so
that not even they carry a number to read back.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrace.analysis.dashboards.values import visible_token
from tailrace.pipeline.shared.pages import COLOURS, html_document
from tailrace.storage.artifact import write_atomically

SITE = Path(__file__).parent / "site"
N_SHADES = 20
HOT_SHADE = 13
"""From this shade on (0.65 of the maximum) text on a dark page turns black."""

_FIFTHS = ("weakest", "second weakest", "middle", "second strongest", "strongest")
_STYLE = """
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 15px; margin: 28px 0 8px; }
p.about { color: var(--muted); margin: 0; }
.example { border-bottom: 1px solid var(--line); padding: 2px 0; }
"""


def write_blind_page(
    path: Path,
    feature_rows: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    item: int,
    *,
    window: int = 16,
) -> None:
    """Write a page of one feature, named by its ``item`` number only; ``path`` holds all of it or its old bytes.

    ``feature_rows`` is the feature's row of the table ``features`` (only ``max`` is read, the end of the colour scale)
    and ``examples`` its rows of the table ``examples``, both as ``to_pylist`` gives them. ``window`` tokens are shown
    on each side. Raises StorageFull.
    """
    sections = "".join(_sections(examples, feature_rows.get("max") or 0.0, window))
    # a class names a shade, so the source says no more than the eye sees
    shades = "".join(f".s{shade} {{ --share: {shade / N_SHADES:.2f} }}\n" for shade in range(1, N_SHADES + 1))
    page = html_document(
        f"Item {item}",
        f"<main>\n<h1>Item {item}</h1>\n"
        '<p class="about">The stronger the colour, the stronger the feature. Each line is centred on its own token.</p>'
        f"\n{sections}</main>",
        style=f"{COLOURS.read_text()}{(SITE / 'tokens.css').read_text()}{_STYLE}{shades}",
    )
    write_atomically(path, page.encode())


def _sections(examples: Sequence[Mapping[str, Any]], largest: float, window: int) -> Iterator[str]:
    top = [example for example in examples if example.get("kind", "top") == "top"]
    yield _section("Strongest examples", top, largest, window)
    bands = sorted({example["band"] for example in examples if example.get("kind") == "band"}, reverse=True)
    for band in bands:
        inside = [example for example in examples if example.get("kind") == "band" and example["band"] == band]
        yield _section(_band_title(band, bands[0] + 1), inside, largest, window)
    drawn = [example for example in examples if example.get("kind") == "random"]
    if drawn:
        yield _section("Random examples", drawn, largest, window)


def _band_title(band: int, n_bands: int) -> str:
    """Name a band in words; the strongest always has an example, the largest activation, so their number is known."""
    if n_bands == len(_FIFTHS):
        return f"Examples from the {_FIFTHS[band]} fifth of the range"
    return f"Examples from part {band + 1} of {n_bands} of the range, counted from the weakest"


def _section(title: str, examples: Sequence[Mapping[str, Any]], largest: float, window: int) -> str:
    lines = "".join(_line(example, largest, window) for example in examples)
    body = f'<ol class="examples">\n{lines}</ol>' if examples else '<p class="about">There are none.</p>'
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>\n"


def _line(example: Mapping[str, Any], largest: float, window: int) -> str:
    here = example["position"] - example["window_start"]
    tokens, activations = example["window_tokens"], example["window_activations"]
    first, last = max(0, here - window), min(len(tokens), here + window + 1)
    spans = [_token(tokens[place], activations[place], largest, place == here) for place in range(first, last)]
    before, after = "".join(spans[: here - first]), "".join(spans[here - first + 1 :])
    return (
        '<li class="example"><p class="window">'
        f'<span class="before">{before}</span>{spans[here - first]}<span class="after">{after}</span></p></li>\n'
    )


def _token(text: str, activation: float | None, largest: float, is_here: bool) -> str:
    shade = shade_of(activation, largest)
    names = ["token", *(["here"] if is_here else []), *([f"fires s{shade}"] if shade else [])]
    names += ["hot"] if shade >= HOT_SHADE else []
    return f'<span class="{" ".join(names)}">{html.escape(visible_token(text))}</span>'


def shade_of(activation: float | None, largest: float) -> int:
    """Return the shade, 0 (none) to ``N_SHADES``, of an activation on the scale from zero to ``largest``."""
    if not activation or not largest > 0 or not activation > 0:
        return 0
    return min(N_SHADES, max(1, math.ceil(activation / largest * N_SHADES)))
