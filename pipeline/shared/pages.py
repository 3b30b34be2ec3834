"""HTML pages: the colours, dark mode and tooltip that all share, pages of one file that need nothing else, and plots.

``html_page`` writes a page; any element with ``data-tip`` gets a tooltip, by mouse, touch and keyboard. ``plot_html``
draws a plot twice, for a desk and for a phone, in colours that follow the page.

Every page states what it may load and run (``content_policy``): a browser refuses whatever a text, a name or a number
smuggles into it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = Path(__file__).parent / "page_files"
COLOURS = FILES / "colours.css"
TOOLTIP = FILES / "tooltip.js", FILES / "tooltip.css"
N_SERIES = 7
"""Colours of lines, of Okabe and Ito (2008) and alike, which the colour-blind can tell apart."""
WIDE, NARROW = (9.6, 5.6), (4.2, 5.2)
"""Inches of a plot on a desk and on a phone, where its text is then as large."""

_GROUP = re.compile(r'<g id="([^"]*)">')
_TIPS = (
    '\n<div id="tooltip" class="tooltip" role="tooltip" hidden></div>\n'
    '<div id="spoken" class="spoken" aria-live="polite"></div>'
)


def content_policy(*scripts: str, has_files: bool = False, asks_server: bool = False) -> str:
    """Return the Content-Security-Policy of a page: no network, and no script but these, which stand in the page.

    A page that ``has_files`` loads scripts, styles and frames from where it lies itself; one that ``asks_server``
    sends requests to the server that it is from, and to no other.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    own = ["'self'"] if has_files else []
    allowed = {
        "script-src": [*own, *(f"'sha256-{one}'" for one in hashes)],
        "style-src": [*own, "'unsafe-inline'"],  # plots have styles at their elements; a style loads nothing but data
        "img-src": ["data:"],
        "connect-src": ["'self'"] if asks_server else [],
        "frame-src": own,
    }
    refused = [f"{name} 'none'" for name in ("default-src", "object-src", "base-uri", "form-action")]
    return "; ".join([*refused, *(f"{name} {' '.join(of)}" for name, of in allowed.items() if of)])


def policy_element(policy: str) -> str:
    """Return the element of a page's head that states its policy; it comes before all that loads or runs."""
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def stated_policy(page: str) -> str:
    """Return the policy that a page made here states."""
    stated = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert stated is not None, "every page is made with one"
    return stated[1]


def html_page(
    title: str, body: str, *, style: str = "", script: str = "", data: Any = None, asks_server: bool = False
) -> str:
    """Return a page with tooltips; all arguments but ``style``, ``script`` are those of ``html_document``."""
    behaviour, look = (path.read_text(encoding="utf-8") for path in TOOLTIP)
    styles = "".join(path.read_text(encoding="utf-8") for path in (COLOURS, FILES / "page.css"))
    return html_document(
        title,
        body + _TIPS,
        style=styles + look + style,
        scripts=[behaviour, *([script] if script else [])],
        data=data,
        asks_server=asks_server,
    )


def html_document(
    title: str,
    body: str,
    *,
    style: str,
    scripts: Sequence[str] = (),
    data: Any = None,
    has_files: bool = False,
    asks_server: bool = False,
) -> str:
    """Return a page that opens from disk; ``body`` is markup, ``title`` text.

    Scripts read ``data`` from the element of that id, as JSON; nothing in it can end the element.
    """
    held = "" if data is None else f'<script type="application/json" id="data">{json_inside(data)}</script>\n'
    scripts = [f"\n{script}" for script in scripts]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{policy_element(content_policy(*scripts, has_files=has_files, asks_server=asks_server))}\n"
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f"{held}{''.join(f'<script>{script}</script>{chr(10)}' for script in scripts)}</body>\n</html>\n"
    )


def json_inside(value: Any) -> str:
    """Return JSON that cannot end the element it stands in, nor break a line of a script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def palette() -> dict[str, str]:
    """Return the colours of a light page, in which plots are drawn, by name: ``ink``, ``line``, ``series-0``, …"""
    light = COLOURS.read_text(encoding="utf-8").partition("@media")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))


def draw_plot(
    draw: Callable[[Figure], Mapping[str, str]], kind: str, size: tuple[float, float] = WIDE
) -> tuple[bytes, Mapping[str, str]]:
    """Return a picture as ``png`` or ``svg``, and what ``draw`` returned.

    ``draw`` fills a figure, in colours of ``palette``, and returns tooltips by the ``gid`` of what they are of.
    """
    # The figure is made without pyplot, which would pick a window system and keep state.
    import matplotlib
    from matplotlib.figure import Figure

    colours = palette()
    style: Any = {
        "figure.facecolor": colours["page"],
        "axes.facecolor": colours["page"],
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "text.color": colours["ink"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": f"tailrace {size}",  # names drawn from it, not at random: the same plot has the same bytes
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        tips = draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue(), tips


def plot_html(draw: Callable[[Figure], Mapping[str, str]], label: str) -> str:
    """Return a plot as markup for ``html_page``: ``draw`` as in ``draw_plot``, called once for each size of screen."""
    return "".join(
        f'<div class="plot {name}">{_inline(*draw_plot(draw, "svg", size), label)}</div>\n'
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    )


def _inline(picture: bytes, tips: Mapping[str, str], label: str) -> str:
    """Return an SVG for a page: in the page's colours, without names that another would share, with tooltips."""
    svg = picture.decode()
    svg = svg[svg.index("<svg") :]  # without the declaration of an XML file and its external DTD
    variables: dict[str, str] = {}
    for name, colour in palette().items():
        variables.setdefault(colour, f"var(--{name})")
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), svg)
    svg = svg.replace("<svg", f'<svg role="group" aria-label="{html.escape(label)}"', 1)

    def group(match: re.Match[str]) -> str:
        tip = html.escape(tips.get(match[1], ""))
        return f'<g data-tip="{tip}" tabindex="0" role="img" aria-label="{tip}">' if tip else "<g>"

    return _GROUP.sub(group, svg)
