"""Steered texts for the terminal, side by side where there is room, and as JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tailrace.pipeline.score.text import note
from tailrace.pipeline.steer.stage import RunSummary, SteerResult, share_interval

_NARROWEST = 30
"""Characters of a column of text; texts that would be narrower stand below each other."""
SHOWN_PROMPTS = 5
"""Prompts whose texts are printed; files have all."""


def show(result: SteerResult, width: int) -> str:
    """Return texts beside each other for a terminal of ``width``, then a line of numbers for each run."""
    parts = (
        ["\n".join(f"feature {name}: {note(about)}" for name, about in result.about.items())] if result.about else []
    )
    for prompt in range(min(len(result.prompts), SHOWN_PROMPTS)):
        heading = f"prompt {prompt + 1} of {len(result.prompts)}: " if len(result.prompts) > 1 else ""
        parts.append("\n".join([f"{heading}{result.prompts[prompt]}", "", *_beside(result, prompt, width)]))
    if len(result.prompts) > SHOWN_PROMPTS:
        parts.append(f"… and {len(result.prompts) - SHOWN_PROMPTS} more prompts; --out has the texts of all")
    parts.append("\n".join(aligned(number_rows(result))))
    if result.n_draws:
        parts.append(
            f"random: median of {result.n_draws} draws of other features that are as often active, with the same "
            "strength times decoder norm; in brackets the least and the most"
        )
    return "\n\n".join(parts) + "\n"


def number_rows(result: SteerResult) -> list[tuple[str, ...]]:
    """Return a heading, and a row for each run and for the random features beside it."""
    counted = () if result.count is None else (f"texts with {result.count}",)
    rows: list[tuple[str, ...]] = [("", "KL, nats", "next tokens changed", *counted)]
    for number, label in enumerate(result.runs):
        own, draws = result.summary(number), result.draws(number)
        if number == 0 and not counted:
            continue
        numbers = ("", "") if number == 0 else (_number(own.kl), _share(own.changed_share))
        rows.append((label, *numbers, *(_counted(own) for _ in counted)))
        if draws:
            kls = [one.kl for one in draws if one.kl is not None]
            shares = [one.changed_share for one in draws if one.changed_share is not None]
            pooled = RunSummary(None, None, sum(one.n_matches for one in draws), sum(one.n_texts for one in draws))
            rows.append(
                ("  random", _spread(kls, _number), _spread(shares, _share), *(_counted(pooled) for _ in counted))
            )
    return rows


def json_of(result: SteerResult) -> dict[str, Any]:
    """Return everything as JSON values: the numbers of each run, then its texts by prompt."""
    texts = result.table().to_pylist()
    return {
        "prompts": list(result.prompts),
        "features": {name: dict(about) for name, about in result.about.items()},
        "count": result.count,
        "runs": [
            {
                "run": label,
                **_summary(result.summary(number)),
                "random": [_summary(one) for one in result.draws(number)],
            }
            for number, label in enumerate(result.runs)
        ],
        "texts": [{key: value for key, value in row.items() if key != "prompt_text"} for row in texts],
    }


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(own) for cell, own in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _summary(one: RunSummary) -> dict[str, Any]:
    return {"kl": one.kl, "changed_share": one.changed_share, "n_matches": one.n_matches, "n_texts": one.n_texts}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _spread(values: Sequence[float], show_value: Any) -> str:
    if not values:
        return "–"
    return f"{show_value(statistics.median(values))} ({show_value(min(values))}–{show_value(max(values))})"


def _counted(one: RunSummary) -> str:
    low, high = share_interval(one.n_matches, one.n_texts)
    return f"{one.n_matches} of {one.n_texts} ({low:.0%}–{high:.0%})"


def _beside(result: SteerResult, prompt: int, width: int) -> Iterator[str]:
    """Yield lines of the texts of a prompt: a column each, or one below the other where columns would be narrow."""
    texts = [(label, result.of(prompt, number).text) for number, label in enumerate(result.runs)]
    gap = 2
    column = (width - gap * (len(texts) - 1)) // len(texts)
    if column < _NARROWEST:
        names = [label for label, _ in texts]
        indent = min(24, max(map(len, names))) + gap
        for label, text in texts:
            lines = _wrapped(text, max(_NARROWEST, width - indent))
            first = label.ljust(indent) if len(label) < indent else f"{label}\n{' ' * indent}"
            yield first + f"\n{' ' * indent}".join(lines)
        return
    cells = [
        [*_wrapped(label, column), "─" * min(column, len(label)), *_wrapped(text, column)] for label, text in texts
    ]
    for row in range(max(map(len, cells))):
        yield (" " * gap).join(own[row].ljust(column) if row < len(own) else " " * column for own in cells).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    lines = text.strip().split("\n")
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]] or [""]
