"""Scores of texts as files: an HTML page that needs nothing else, a PNG, or JSON."""

from __future__ import annotations

import html
import io
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tailrace.analysis.dashboards.values import PART, rounded, rounded_list, visible_token
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.score.stage import ScoredText, Scores
from tailrace.pipeline.score.text import as_json, feature_note
from tailrace.pipeline.shared.pages import html_page
from tailrace.storage.artifact import make_directory, write_output
from tailrace.storage.errors import SettingsError

SUFFIXES = (".html", ".png", ".json")
TOKENS_PER_ROW = 48
"""Tokens in a row of bars of a PNG."""
MAX_ROWS = 40
"""Rows of bars in one PNG."""

_FILES = Path(__file__).parent / "page_files"
_TITLE = 80
"""Letters of a text in the title of its page."""


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which of the three kinds of file is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")


def write_scores(path: Path, scores: Scores, dashboard: Path | None = None) -> None:
    """Write ``scores`` as the ending of ``path`` says; a page links to the features of ``dashboard``, if it is given.

    Raises SettingsError, StorageFull, and the errors of opening the dashboard.
    """
    check_output(path)
    match path.suffix.lower():
        case ".json":
            content = (json.dumps(as_json(scores), indent=1, ensure_ascii=False) + "\n").encode()
        case ".html":
            links = {} if dashboard is None else feature_links(scores, DashboardManifest.read(dashboard))
            base = quote(os.path.relpath(dashboard or path, path.absolute().parent))
            content = page(scores, {feature: f"{base}/{link}" for feature, link in links.items()}).encode()
        case _:
            content = _draw(scores)
    make_directory(path.absolute().parent)
    write_output(path, content)


def feature_links(scores: Scores, dashboard: DashboardManifest) -> dict[int, str]:
    """Return the address in a dashboard of each feature that is a column of ``scores``, if its layer is there, once."""
    links = {}
    for feature in scores.features:
        site, own = scores.place(feature)
        site = scores.site if site is None else site
        if address := dashboard.address(site):
            links[feature] = f"{address}#feature={own}"
    return links


def page(scores: Scores, links: Mapping[int, str] | None = None) -> str:
    """Return a page that shows every text, coloured by a feature, a strip of colours per feature, and the numbers."""
    first = "".join(
        token for token, scored in zip(scores.texts[0].tokens, scores.texts[0].is_scored, strict=True) if scored
    )
    about = f"{scores.site.replace('layer', 'layer ')} of {scores.model}"
    title = f"“{first.strip()[:_TITLE]}{'…' if len(first.strip()) > _TITLE else ''}”"
    title += f" and {len(scores.texts) - 1} more" if scores.texts[1:] else ""
    sections = []
    for number, text in enumerate(scores.texts, start=1):
        heading = f"<h2>Text {number}</h2>" if scores.texts[1:] else ""
        numbers = _table(scores, text) if scores.features else "<p>No feature is active.</p>"
        sections.append(f'<section>{heading}<p class="passage"></p>\n<div class="strips"></div>\n{numbers}</section>')
    what = "Pre-activations" if scores.is_raw else "Activations"
    body = (
        f'<header><h1>{html.escape(title)}</h1>\n<p class="facts">{what} of {html.escape(scores.transcoder)} in '
        f"{html.escape(about)}. The text has the colours of the feature chosen; the strongest colour is "
        f"{scores.largest():.4g}, the largest value on the page. Every context begins with the BOS; what is grey is "
        f"not scored.</p></header>\n<main>\n{chr(10).join(sections)}\n</main>"
    )
    style, script = ((_FILES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return html_page(f"{title}: {about}", body, style=style, script=script, data=_page_data(scores, links or {}))


def _page_data(scores: Scores, links: Mapping[int, str]) -> dict[str, Any]:
    """Return texts, values by feature and then token (null where nothing is scored), and what is known of features."""
    return {
        "largest": rounded(scores.largest()),
        "features": [
            {"label": scores.label(one), "note": feature_note(scores, one), "href": links.get(one)}
            for one in scores.features
        ],
        "texts": [
            {
                "tokens": [(token or PART).replace("\n", "⏎\n") for token in text.tokens],
                "tips": [visible_token(token) for token in text.tokens],
                "values": [rounded_list(column) for column in text.values.T],
            }
            for text in scores.texts
        ],
    }


def _table(scores: Scores, text: ScoredText) -> str:
    head = "".join(
        f'<th scope="col" class="number">feature {html.escape(scores.label(feature))}</th>'
        for feature in scores.features
    )
    if not scores.is_chosen:
        head += '<th scope="col">strongest here</th>'
    rows = []
    for position, (token, values) in enumerate(zip(text.tokens, text.values.tolist(), strict=True)):
        cells = "".join(f'<td class="number">{"–" if math.isnan(value) else f"{value:.4g}"}</td>' for value in values)
        if not scores.is_chosen:
            told = ", ".join(
                html.escape(f"{scores.label(feature)} ({value:.4g})") for feature, value in text.strongest[position]
            )
            cells += f"<td>{told or '–'}</td>"
        shown = html.escape(visible_token(token))
        rows.append(f'<tr><td class="number">{position}</td><td class="token">{shown}</td>{cells}</tr>')
    return (
        '<details><summary>Values</summary><div class="scroll-x" role="region" aria-label="Values" tabindex="0">'
        '<table><thead><tr><th scope="col" class="number">position</th>'
        f'<th scope="col">token</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _draw(scores: Scores) -> bytes:
    """Draw a bar per token, for every text and feature, in rows of ``TOKENS_PER_ROW``."""
    from matplotlib.figure import Figure

    rows = [
        (number, text, column, start)
        for number, text in enumerate(scores.texts, start=1)
        for column in range(len(scores.features))
        for start in range(0, len(text.tokens), TOKENS_PER_ROW)
    ]
    if not 0 < len(rows) <= MAX_ROWS:
        raise SettingsError(
            f"--out: a PNG has 1 to {MAX_ROWS} rows of {TOKENS_PER_ROW} tokens, this would have {len(rows)}; "
            "write .html, or score less"
        )
    width = min(TOKENS_PER_ROW, max(len(text.tokens) for text in scores.texts))
    figure = Figure(figsize=(2 + 0.3 * width, 2.2 * len(rows)), layout="constrained")
    lowest = min(0.0, *(float(np.nanmin(text.values, initial=0)) for text in scores.texts))
    limits = (1.05 * lowest, 1.05 * (scores.largest() or 1))
    for axes, (number, text, column, start) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        _draw_row(axes, scores, text, column, range(start, min(start + TOKENS_PER_ROW, len(text.tokens))))
        axes.set_xlim(-0.6, width - 0.4)
        axes.set_ylim(*limits)
        if len(scores.texts) > 1 and column == 0 and start == 0:
            axes.set_title(f"text {number}", fontsize=8, loc="left")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a script that matplotlib's font lacks is drawn as boxes; the page has it
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_row(axes: Any, scores: Scores, text: ScoredText, column: int, tokens: range) -> None:
    values = np.nan_to_num(text.values[tokens.start : tokens.stop, column])
    colours = ["#ff8c00" if value > 0 else "#56a0e9" for value in values]
    axes.bar(range(len(tokens)), values, color=colours)
    labels = [visible_token(text.tokens[place]) for place in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_ylabel(f"feature {scores.label(scores.features[column])}", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
