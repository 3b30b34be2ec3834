"""Data of a site as scripts: a page opened from disk may load a script of its folder, but may not fetch a file.

A file is one call with a name and a string, gzip in base64, which every browser of 2023 or later unpacks by itself. So
nothing in it is ever read as markup, and it has a third of the bytes of the same JSON (docs/dashboard.md).
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

_FUNCTION = "dashboardData"
"""What `site/data.js` defines to receive the data."""


def pack(name: str, value: Any) -> bytes:
    """Return the script that hands ``value`` over under ``name``; the same value gives the same bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return f'{_FUNCTION}("{name}", "{packed}");\n'.encode()


def unpack(script: bytes) -> Any:
    """Return what was packed."""
    packed = script.decode().rpartition(', "')[2].removesuffix('");\n')
    return json.loads(gzip.decompress(base64.b64decode(packed)))
