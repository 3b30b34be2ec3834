"""Every table of the ``tables`` artifact. To add one: a new module here with a ``TABLE``, and its name in the tuple."""

from __future__ import annotations

from tailrace.analysis.harvest.table import Table, TableDescription
from tailrace.analysis.tables import (
    activations,
    coactivation,
    connections,
    documents,
    examples,
    features,
    layers,
    rows,
)

TABLES: tuple[Table, ...] = (
    features.TABLE,
    examples.TABLE,
    activations.TABLE,
    rows.TABLE,
    coactivation.TABLE,
    layers.TABLE,
)

EVERY_TABLE: tuple[TableDescription, ...] = (*TABLES, connections.DESCRIPTION, documents.DESCRIPTION)
"""Those that are made without the pass, too."""
