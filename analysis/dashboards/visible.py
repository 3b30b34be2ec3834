"""Token texts as a reader can see them: line ends, tabs and lone spaces get a sign, what would draw nothing its code.

A tokenizer's strings are arbitrary text. Left as they are, a line end breaks a line of examples, a zero-width space is
nothing at all, and a direction mark turns its neighbours around.
"""

from __future__ import annotations

SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
SPACE = "␣"
PART = "◌"
"""A token that only begins a character, which stands at a later token."""


def visible_token(text: str) -> str:
    """Return ``text`` with something to see for every character; spaces stay unless the token is nothing else."""
    if not text:
        return PART
    if not text.strip(" "):
        return SPACE * len(text)
    return text if text.isprintable() else "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    """Return a character, its sign, or its code if it has no glyph: controls, formats, separators, unassigned ones."""
    if character.isprintable():
        return character
    return SIGNS.get(character, f"[U+{ord(character):04X}]")
