"""Token texts where a token may be part of a character, as in tokenizers that split text into bytes.

In a vocabulary, bytes that are no complete UTF-8 character are written ``<0xE6>`` each, the way SentencePiece names its
byte tokens. In a sequence of tokens their characters can be put together again: a character stands at the token that
completes it, and a token that only begins one is the empty string, so that the texts still join to what was read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BYTE = re.compile(r"<0x([89A-F][0-9A-F])>")
_ESCAPES = 0xDC00  # surrogateescape keeps byte b as the lone surrogate U+DC00 + b


def text_of_bytes(data: bytes) -> str:
    """Return UTF-8 ``data`` as text, each byte that belongs to no complete character as ``<0xNN>``."""
    return "".join(_shown(character) for character in data.decode("utf-8", "surrogateescape"))


def has_bytes(text: str) -> bool:
    """Return whether a token's text has bytes that are no complete character."""
    return _BYTE.search(text) is not None


def join_characters(texts: Sequence[str]) -> list[str]:
    """Return the texts of neighbouring tokens with characters that were split over them put together.

    A character stands at the token with its last byte. Bytes that make no character here, as at the ends of an
    excerpt, stay as they were.
    """
    if not any(map(has_bytes, texts)):
        return list(texts)
    pieces = [_bytes_of(text) for text in texts]
    owners = [index for index, piece in enumerate(pieces) for _ in piece]
    joined = [""] * len(texts)
    end = 0
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        end += len(character.encode("utf-8", "surrogateescape"))
        joined[owners[end - 1]] += _shown(character)
    return joined


def _bytes_of(text: str) -> bytes:
    """Return the bytes a token stands for."""
    pieces = _BYTE.split(text)  # text, hexadecimal digits, text, ...
    return b"".join(
        bytes.fromhex(piece) if index % 2 else piece.encode("utf-8", "surrogatepass")
        for index, piece in enumerate(pieces)
    )


def _shown(character: str) -> str:
    code = ord(character) - _ESCAPES
    return f"<0x{code:02X}>" if 0x80 <= code <= 0xFF else character
