"""Scores of texts for the terminal, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tailrace.analysis.dashboards.values import visible_text, visible_token
from tailrace.pipeline.score.stage import ScoredText, Scores

_BAR = 24


def show(scores: Scores) -> str:
    """Return a table per text: a column per feature asked for, or else the strongest features of each token."""
    parts = [] if scores.is_chosen else ["\n".join(_overall(scores))]
    for number, text in enumerate(scores.texts, start=1):
        heading = [f"text {number} of {len(scores.texts)}"] if len(scores.texts) > 1 else []
        lines = _columns(scores, text) if scores.is_chosen else _strongest(scores, text)
        parts.append("\n".join([*heading, *lines]))
    what = "pre-activations" if scores.is_raw else "activations"
    parts.append(
        f"{what} of {scores.transcoder} ({scores.site}), float32; every context begins with BOS; – where it has not "
        "learnt, such as there"
    )
    return "\n\n".join(parts) + "\n"


def as_json(scores: Scores) -> dict[str, Any]:
    """Return scores as JSON values; null where nothing is scored."""
    return {
        "transcoder": scores.transcoder,
        "site": scores.site,
        "values": "pre-activation" if scores.is_raw else "activation",
        "bos": "prepended to every context; null where the transcoder has not learnt, such as there",
        "features": [{**scores.record(feature), **scores.about.get(feature, {})} for feature in scores.features],
        "texts": [_text_as_json(scores, text) for text in scores.texts],
    }


def feature_note(scores: Scores, feature: int) -> str:
    """Return in a few words what the tables say of a feature; empty without tables."""
    return note(scores.about.get(feature, {}))


def note(about: Mapping[str, Any]) -> str:
    """Return in a few words what is known of a feature, by the names of ``about_features``."""
    notes = [visible_text(label)] if (label := about.get("label")) else []
    if (frequency := about.get("frequency")) is not None:
        notes.append(f"active on {frequency:.2%}")
    if (largest := about.get("max")) is not None:
        notes.append(f"at most {largest:.4g}")
    if (token := about.get("top_token")) is not None:
        notes.append(f"top token {token!r}")
    if promoted := about.get("promoted_tokens"):
        notes.append(f"promotes {' '.join(repr(token) for token in promoted[:5])}")
    return ", ".join(notes)


def _text_as_json(scores: Scores, text: ScoredText) -> dict[str, Any]:
    values = [[None if math.isnan(value) else value for value in row] for row in text.values.tolist()]
    told: dict[str, Any] = {"tokens": text.tokens, "token_ids": text.token_ids, "values": values}
    if not scores.is_chosen:
        told["strongest"] = [
            [{**scores.record(feature), "value": value} for feature, value in row] for row in text.strongest
        ]
    return told


def _overall(scores: Scores) -> Iterator[str]:
    if not scores.features:
        yield "no feature is active on any token"
        return
    yield "strongest features"
    rows = [("feature", "max", "at token", "tokens", "")]
    for column, feature in enumerate(scores.features):
        places = [
            (text.values[i, column], _token(text, i))
            for text in scores.texts
            for i in text.is_scored.nonzero()[0].tolist()
        ]
        value, token = max(places, key=lambda place: place[0])
        n_active = sum(bool(one > 0) for one, _ in places)
        rows.append((scores.label(feature), f"{value:.3f}", token, str(n_active), feature_note(scores, feature)))
    yield from _aligned(rows, left=(2, 4))


def _token(text: ScoredText, position: int) -> str:
    """Return a token as it is shown by itself; of one that begins a character, the character as well."""
    own = visible_token(text.tokens[position])
    if text.tokens[position]:
        return own
    completed = next((token for token in text.tokens[position:] if token), "")
    return f"{own} of {visible_token(completed)}" if completed else own


def _strongest(scores: Scores, text: ScoredText) -> list[str]:
    rows = [("position", "token", "strongest features")]
    for position, (token, found) in enumerate(zip(text.tokens, text.strongest, strict=True)):
        told = "  ".join(f"{scores.label(feature)} ({value:.3f})" for feature, value in found)
        rows.append((str(position), visible_token(token), told if text.is_scored[position] else "–"))
    return _aligned(rows, left=(1, 2))


def _columns(scores: Scores, text: ScoredText) -> list[str]:
    notes = [f"feature {scores.label(one)}: {note}" for one in scores.features if (note := feature_note(scores, one))]
    has_bar = len(scores.features) == 1
    largest = scores.largest()
    rows = [
        ("position", "token", *(f"feature {scores.label(feature)}" for feature in scores.features), *([""] * has_bar))
    ]
    for position, token in enumerate(text.tokens):
        values = text.values[position].tolist()
        shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
        bar = [_bar(values[0], largest)] if has_bar else []
        rows.append((str(position), visible_token(token), *shown, *bar))
    return [*notes, *_aligned(rows, left=(1, *([len(rows[0]) - 1] * has_bar)))]


def _bar(value: float, largest: float) -> str:
    if math.isnan(value) or largest == 0:
        return ""
    return ("█" if value > 0 else "░") * round(abs(value) / largest * _BAR)


def _aligned(rows: Sequence[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    """Return rows as lines of equal columns, those numbered in ``left`` to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
