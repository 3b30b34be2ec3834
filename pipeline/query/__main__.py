"""Write the page that documents the ready queries: ``python -m tailrace.pipeline.query docs/queries.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from tailrace.pipeline.query.page import queries_page

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(queries_page())
