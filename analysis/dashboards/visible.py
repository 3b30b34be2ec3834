"""Token texts as a reader can see them: line ends, tabs and lone spaces get a sign, what would draw nothing its code.

A tokenizer's strings are arbitrary text. Left as they are, a line end breaks a line of examples, a zero-width space is
nothing at all, and a direction mark turns its neighbours around.
"""

from __future__ import annotations

import unicodedata

SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
SPACE = "␣"
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Cn", "Co", "Cs"}
"""Unicode categories without a glyph of their own: controls, formats, separators, unassigned, private, surrogates."""


def visible_token(text: str) -> str:
    """Return ``text`` with something to see for every character; spaces stay unless the token is nothing else."""
    if not text:
        return "∅"
    if not text.strip(" "):
        return SPACE * len(text)
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    is_odd_space = character != " " and unicodedata.category(character) == "Zs"
    if is_odd_space or unicodedata.category(character) in _INVISIBLE:
        return f"[U+{ord(character):04X}]"
    return character
