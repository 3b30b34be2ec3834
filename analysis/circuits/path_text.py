"""Paths and nodes as lines of text: ``mlp8tc[89]@9: 7.6 <- attn2[2]@8: 0.35 <- embed0@8: 0.12``."""

from __future__ import annotations

from collections.abc import Sequence

from tailrace.analysis.circuits.paths import Path


def show_path(path: Path, *, with_values: bool = True) -> str:
    """Return one path in one line; each value is a contribution to the root, two significant digits."""
    if not with_values:
        return " <- ".join(str(step.node) for step in path)
    return " <- ".join(f"{step.node}: {show_value(step.value)}{'*' if step.is_capped else ''}" for step in path)


def show_paths(paths: Sequence[Path], number: int | None = None) -> list[str]:
    """Return one line per path; ``number`` of a round goes before the path's own."""
    before = "" if number is None else f"[{number}]"
    return [f"Path {before}[{place}]: {show_path(path)}" for place, path in enumerate(paths)]


def show_rounds(rounds: Sequence[Sequence[Path]]) -> list[str]:
    """Return the paths of every round of a search under the number of their steps; nothing for no rounds."""
    lines = []
    for number, paths in enumerate(rounds):
        lines += [f"--- Paths of size {len(paths[0])} ---", *show_paths(paths, number)] if paths else []
    return lines


def show_value(value: float) -> str:
    """Return a number with two significant digits, without exponent where that stays short."""
    text = f"{value:.2g}"
    return f"{value:.0f}" if "e" in text and 10 <= abs(value) < 1e6 else text
