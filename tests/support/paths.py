"""Where the repository, its documents and its sample text lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SPEECHES = ROOT / "tests" / "data" / "speeches.jsonl"
