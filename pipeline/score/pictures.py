"""Scores of texts as files: an HTML page that needs nothing else, a PNG, or JSON."""

from __future__ import annotations

import html
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tailrace.analysis.dashboards.values import PART, visible_token
from tailrace.pipeline.score.stage import ScoredText, Scores
from tailrace.pipeline.score.text import as_json, feature_note
from tailrace.storage.artifact import make_directory, write_atomically
from tailrace.storage.errors import SettingsError

SUFFIXES = (".html", ".png", ".json")
POSITIVE, NEGATIVE = (255, 140, 0), (86, 160, 233)
"""Colours of the largest absolute value of either sign, on white; dark text can be read on both."""
TOKENS_PER_ROW = 48
"""Tokens in a row of bars of a PNG."""
MAX_ROWS = 40
"""Rows of bars in one PNG."""

_STYLE = """
body{font:16px/1.6 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:2em auto;max-width:60em;padding:0 1em}
h1{font-size:1.4em}h2{font-size:1.1em;margin-bottom:.2em}h3{font-size:1em;margin:1.2em 0 .2em}
.note{color:#555;margin:.2em 0}
.text{font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em}
.text span{border-radius:2px}.bos{color:#767676}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.1em .8em;text-align:left}
td.n,th.n{text-align:right}td.token{white-space:pre;font-family:ui-monospace,monospace}
""".strip()


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which of the three kinds of file is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(SUFFIXES)}")


def write_scores(path: Path, scores: Scores) -> None:
    """Write ``scores`` as the ending of ``path`` says. Raises SettingsError, or StorageFull."""
    check_output(path)
    match path.suffix.lower():
        case ".json":
            content = (json.dumps(as_json(scores), indent=1, ensure_ascii=False) + "\n").encode()
        case ".html":
            content = page(scores).encode()
        case _:
            content = _draw(scores)
    make_directory(path.absolute().parent)
    write_atomically(path, content)


def page(scores: Scores) -> str:
    """Return a page that shows every text once for each feature, its tokens coloured, with the numbers below."""
    what = "Pre-activations" if scores.is_raw else "Activations"
    title = html.escape(f"{what} of {scores.transcoder}")
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'</head><body><main><h1>{title}</h1><p class="note">Site {html.escape(scores.site)}, float32. Every context '
        "begins with BOS; grey tokens are not scored. Colours are by value over the largest absolute value of the "
        f"page, {scores.largest():.4g}.</p>"
    ]
    for number, text in enumerate(scores.texts, start=1):
        parts.append(f"<section><h2>Text {number}</h2>" if len(scores.texts) > 1 else "<section>")
        parts += [_coloured(scores, text, column) for column in range(len(scores.features))]
        parts.append(_table(scores, text) if scores.features else "<p>No feature is active.</p>")
        parts.append("</section>")
    return "\n".join([*parts, "</main></body></html>\n"])


def colour(value: float, largest: float) -> str:
    """Return a value's colour, from white at 0 to full at ± ``largest``, as #rrggbb; white where all are 0."""
    share = min(abs(value) / largest, 1) if largest > 0 and not math.isnan(value) else 0.0
    end = POSITIVE if value > 0 else NEGATIVE
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02x}" for channel in end)


def _coloured(scores: Scores, text: ScoredText, column: int) -> str:
    feature, largest = scores.features[column], scores.largest()
    spans = []
    for token, value in zip(text.tokens, text.values[:, column].tolist(), strict=True):
        shown = html.escape(token or PART).replace("\n", "⏎\n")
        if math.isnan(value):
            spans.append(f'<span class="bos" title="not scored">{shown}</span>')
        else:
            spans.append(f'<span style="background:{colour(value, largest)}" title="{value:.4g}">{shown}</span>')
    note = feature_note(scores, feature)
    about = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<h3>Feature {html.escape(scores.label(feature))}</h3>{about}<div class="text">{"".join(spans)}</div>'


def _table(scores: Scores, text: ScoredText) -> str:
    head = "".join(
        f'<th scope="col" class="n">feature {html.escape(scores.label(feature))}</th>' for feature in scores.features
    )
    if not scores.is_chosen:
        head += '<th scope="col">strongest here</th>'
    rows = []
    for position, (token, values) in enumerate(zip(text.tokens, text.values.tolist(), strict=True)):
        cells = "".join(f'<td class="n">{"–" if math.isnan(value) else f"{value:.4g}"}</td>' for value in values)
        if not scores.is_chosen:
            told = ", ".join(
                html.escape(f"{scores.label(feature)} ({value:.4g})") for feature, value in text.strongest[position]
            )
            cells += f"<td>{told or '–'}</td>"
        rows.append(
            f'<tr><td class="n">{position}</td><td class="token">{html.escape(visible_token(token))}</td>{cells}</tr>'
        )
    return (
        '<details><summary>Values</summary><table><thead><tr><th scope="col" class="n">position</th>'
        f'<th scope="col">token</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></details>'
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
