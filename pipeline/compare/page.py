"""The matches of two dictionaries as a page that needs nothing else: a list to search, a bar for each similarity."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tailrace.analysis.dashboards.values import rounded
from tailrace.pipeline.shared.pages import html_page

NAMES = {"cosine": "decoder cosine", "phi": "φ of firing"}
"""What a measure is called."""
SIDES = ("a", "b")
_FILES = Path(__file__).parent / "page_files"


def page(table: pa.Table, summary: Mapping[str, Any], about: Sequence[Mapping[int, str]]) -> str:
    """Return the page of a comparison; ``about`` says for each side in a word what a feature is about."""
    names = _names([summary[side]["tables"] for side in SIDES])
    title = f"Features of {names[0]} and {names[1]}"
    measures = [measure for measure in NAMES if measure in summary]
    reasons = [f'<p class="facts">Not compared, {html.escape(why)}</p>' for why in summary["left_out"].values()]
    body, style, script = ((_FILES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    parts = {"TITLE": html.escape(title), "LEFT OUT": "\n".join(reasons), "SHARES": _shares(summary, measures, names)}
    body = re.sub(r"<!--(.+?)-->", lambda match: parts[match[1]], body)  # at once: a name may look like a part
    data = {
        "names": names,
        "measures": [
            {"name": NAMES[one], "chance": [summary[one][side]["chance"] for side in SIDES]} for one in measures
        ],
        "sides": [_side(table.filter(pc.field("side") == side), measures, about[n]) for n, side in enumerate(SIDES)],
    }
    return html_page(title, body, style=style, script=script, data=data)


def _names(paths: Sequence[str]) -> list[str]:
    """Return the names of two folders, with those that they lie in if they are called alike."""
    first, second = (Path(path) for path in paths)
    short = [first.name, second.name]
    return short if short[0] != short[1] else [f"{path.parent.name}/{path.name}" for path in (first, second)]


def _side(rows: pa.Table, measures: Sequence[str], about: Mapping[int, str]) -> dict[str, Any]:
    """Return the features of a side in columns: what each is about, and for each measure its most similar."""
    return {
        "about": [about.get(feature, "") for feature in range(rows.num_rows)],
        "similar": [
            {
                "feature": rows[f"{measure}_feature"].to_pylist(),
                "value": [rounded(value) for value in rows[measure].to_pylist()],
                "state": [
                    int(bool(matched)) + int(bool(matched and mutual))
                    for matched, mutual in zip(
                        rows[f"{measure}_matched"].to_pylist(), rows[f"{measure}_mutual"].to_pylist(), strict=True
                    )
                ],
            }
            for measure in measures
        ],
    }


def _shares(summary: Mapping[str, Any], measures: Sequence[str], names: Sequence[str]) -> str:
    """Return a table of how many features match, a row for each measure and direction."""
    rows = []
    for measure in measures:
        for n, side in enumerate(SIDES):
            one = summary[measure][side]
            cells = "".join(f'<td class="number">{text}</td>' for text in _numbers(one))
            way = html.escape(f"{names[n]} → {names[1 - n]}")
            rows.append(f'<tr><th scope="row">{way}</th><td>{NAMES[measure]}</td>{cells}</tr>')
    head = "".join(
        f'<th scope="col" class="number">{text}</th>' for text in ("matched", "both ways", "median", "compared")
    )
    return (
        '<div class="scroll-x" role="region" aria-label="Shares" tabindex="0"><table class="shares"><thead><tr>'
        f'<td></td><th scope="col">measure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _numbers(one: Mapping[str, Any]) -> tuple[str, ...]:
    if not one["compared"]:
        return "–", "–", "–", "0"
    return f"{one['matched']:.1%}", f"{one['mutual']:.1%}", f"{one['median']:.3f}", f"{one['compared']:,}"
