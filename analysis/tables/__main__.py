"""Write the page that documents the tables: ``python -m tailrace.analysis.tables docs/tables.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from tailrace.analysis.harvest.table import tables_page
from tailrace.analysis.tables import EVERY_TABLE

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(tables_page(EVERY_TABLE))
