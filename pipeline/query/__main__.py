"""Write the page that documents the ready queries: ``python -m pipeline.query docs/queries.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.query.page import queries_page

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(queries_page())
