"""The ratings file: one line per item, filled in by hand or by the rating page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tailrace.analysis.blind.tally import VERDICTS, Rating
from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import ArtifactMissing, SettingsError
from tailrace.storage.parsing import read_text

FILE = "ratings.csv"
_ITEM = re.compile(r"\d{1,9}")
COLUMNS = ("item", "interpretable", "context_free", "note")
_FREE = {"yes": True, "no": False, "": False}
"""What may stand under ``context_free``; nothing means no."""


def write_blank(path: Path, n_items: int) -> None:
    """Write a file with a line for every item and nothing filled in; an existing one is left alone."""
    if path.exists():
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([item, "", "", ""] for item in range(1, n_items + 1))
    write_atomically(path, text.getvalue().encode())


def read_ratings(path: Path, n_items: int) -> dict[int, Rating]:
    """Return the rating of every item, 1 to ``n_items``.

    Raises ArtifactMissing, or SettingsError with every line that cannot be counted and every item without one.
    """
    try:
        text = read_text(path, "utf-8-sig")  # spreadsheets put a byte order mark in front
    except FileNotFoundError as error:
        raise ArtifactMissing(f"{path}: there are no ratings; save them from rate.html, or fill in a copy") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as text ({error})") from error
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise SettingsError(f"{path}: cannot be read as CSV ({error})") from error
    header = tuple(name.strip() for name in rows[0]) if rows else ()
    if header != COLUMNS:
        raise SettingsError(
            f"{path}: begins with {','.join(header) or 'nothing'}, wanted the columns {','.join(COLUMNS)}, with "
            "commas between them"
        )
    ratings: dict[int, Rating] = {}
    problems = list(_read_lines(rows[1:], n_items, ratings))
    if missing := [item for item in range(1, n_items + 1) if item not in ratings]:
        told = {int(line[0]) for line in rows[1:] if line and _ITEM.fullmatch(line[0].strip())}
        if absent := [item for item in missing if item not in told]:
            problems.append(f"item {_listed(absent)}: has no line")
    if problems:
        raise SettingsError(f"{path}: cannot be counted yet:\n" + "\n".join(f"  {line}" for line in problems))
    return ratings


def _read_lines(rows: Sequence[Sequence[str]], n_items: int, ratings: dict[int, Rating]) -> Iterator[str]:
    """Put every line that can be read into ``ratings``; yield a sentence for every other one."""
    seen: dict[int, int] = {}
    unrated: list[int] = []
    for number, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not _ITEM.fullmatch(cells[0]) or not 1 <= int(cells[0]) <= n_items:
            yield f"line {number}: {cells[0]!r} is no item, they go from 1 to {n_items}"
            continue
        item = int(cells[0])
        if item in seen:
            yield f"line {number}: item {item} was rated in line {seen[item]} already"
            continue
        seen[item] = number
        verdict, free = (cells[place].lower() if place < len(cells) else "" for place in (1, 2))
        if not verdict:
            unrated.append(item)
            continue
        if free not in _FREE:
            yield f"line {number}: context_free is {free!r}, wanted yes, no or nothing"
        for known in VERDICTS:
            if verdict == known:
                ratings[item] = Rating(known, _FREE.get(free, False))
        if item not in ratings:
            yield f"line {number}: interpretable is {verdict!r}, wanted {', '.join(VERDICTS)}"
    if unrated:
        yield f"item {_listed(unrated)}: is not rated"


def _listed(items: Sequence[int], most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
