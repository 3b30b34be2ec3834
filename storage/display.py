"""HTML by which objects show themselves in a notebook: a card of facts, a table, tokens shaded by their activations.

Everything is escaped; nothing is a script, or loaded from elsewhere. Colours are the notebook's own or half
transparent, so they are readable on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_CARD = "border-left:3px solid #f58518;padding:.1em 0 .1em .9em;margin:.3em 0;line-height:1.5"
_LINE = "1px solid rgba(128,128,128,.35)"
_CELL = "padding:.15em .9em .15em 0;vertical-align:top;background:none;border:0;color:inherit"
_NUMBER = "text-align:right;font-variant-numeric:tabular-nums"
_TEXT = "text-align:left"


def card(title: str, facts: Mapping[str, object], *parts: str, note: object = "") -> str:
    """Return a box with a title, ``note`` beside it, facts by name in one line, and further parts, which are HTML.

    A fact that is None is left out.
    """
    named = [f"{_label(name)} {escape(shown(value))}" for name, value in facts.items() if value is not None]
    line = f'<div style="margin:.25em 0">{" &nbsp; ".join(named)}</div>' if named else ""
    return f'<div style="{_CARD}"><b>{escape(title)}</b> {_label(note)}{line}{"".join(parts)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers stand to the right, None is a dash."""
    head = "".join(
        f'<th style="{_CELL};{_TEXT};font-weight:normal;opacity:.65;border-bottom:{_LINE}">{escape(name)}</th>'
        for name in columns
    )
    lines = [f'<tr style="background:none">{"".join(map(_cell, row))}</tr>' for row in rows]
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:.3em 0;border:0">'
        f"<tr>{head}</tr>{''.join(lines)}</table></div>"
    )


def tokens(texts: Sequence[str], strengths: Sequence[float], at: int | None = None) -> str:
    """Return the tokens of a passage, shaded by strengths from 0 to 1; that at index ``at`` is in bold."""
    return "".join(
        f'<span style="white-space:pre-wrap{_shade(strength)}{";font-weight:bold" if index == at else ""}">'
        f"{escape(text)}</span>"
        for index, (text, strength) in enumerate(zip(texts, strengths, strict=True))
    )


def line(html: str, label: str = "") -> str:
    """Return a line of HTML behind a label in small type."""
    return f'<div style="margin:.2em 0">{_label(label)} {html}</div>'


def shown(value: object) -> str:
    """Return a value as people read it: 11,049, 0.2704, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def share(value: float | None) -> str:
    """Return a share as a percentage, a dash for None."""
    return shown(None) if value is None else f"{value:.1%}"


def _label(text: object) -> str:
    return f'<span style="opacity:.65">{escape(str(text))}</span>' if str(text) else ""


def _cell(value: object) -> str:
    is_number = isinstance(value, int | float) or value is None
    return f'<td style="{_CELL};{_NUMBER if is_number else _TEXT}">{escape(shown(value))}</td>'


def _shade(strength: float) -> str:
    if not strength > 0:  # NaN too: the cache has no row of this token
        return ""
    return f";background:rgba(245,133,24,{0.12 + 0.6 * min(strength, 1):.2f});border-radius:.2em"
