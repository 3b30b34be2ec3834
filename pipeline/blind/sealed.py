"""A key that nobody reads by accident: compressed and encoded, with a digest of it that is told when it is made.

It hides nothing from somebody who decodes it, and need not: a draw can be repeated from its seed anyway. It keeps the
answer out of sight of an honest rater, of editors and of searches, and its digest shows if it was changed afterwards.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import textwrap
import zlib
from pathlib import Path
from typing import Any

from tailrace.storage.artifact import write_atomically
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing
from tailrace.storage.parsing import parse_json, read_regular

_WARNING = "The answers, encoded so that they are not read by accident. `pipeline blind tally` opens them after rating."


def seal(path: Path, content: dict[str, Any]) -> str:
    """Write ``content``, JSON, so that it cannot be read in passing; return its commitment, ``sha256:…``."""
    text = json.dumps(content, sort_keys=True).encode()
    encoded = base64.b64encode(zlib.compress(text, 9)).decode()
    write_atomically(path, "\n".join([_WARNING, *textwrap.wrap(encoded, 100), ""]).encode())
    return _commitment(text)


def unseal(path: Path, commitment: str) -> dict[str, Any]:
    """Return what was sealed. Raises ArtifactMissing, or ArtifactCorrupt if it is not what the commitment is of."""
    try:
        lines = read_regular(path).splitlines()
    except FileNotFoundError as error:
        raise ArtifactMissing(
            f"{path}: the sealed key is gone; restore it, or draw again with the same seed"
        ) from error
    except ValueError as error:
        raise ArtifactCorrupt(f"{path}: {error}; restore it") from error
    try:
        text = zlib.decompress(base64.b64decode(b"".join(lines[1:]), validate=True))
    except (binascii.Error, zlib.error) as error:
        raise ArtifactCorrupt(f"{path}: cannot be decoded ({error}); restore it") from error
    if (found := _commitment(text)) != commitment:
        raise ArtifactCorrupt(
            f"{path}: is not what was sealed: its digest is {found}, the one told then {commitment}; restore it"
        )
    content: dict[str, Any] = parse_json(text)
    return content


def _commitment(text: bytes) -> str:
    return "sha256:" + hashlib.sha256(text).hexdigest()
