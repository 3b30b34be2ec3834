"""Every table of the ``tables`` artifact. To add one: a new module here with a ``TABLE``, and its name in the tuple."""

from __future__ import annotations

from analysis.table import Table
from analysis.tables import examples, features, layers

TABLES: tuple[Table, ...] = (features.TABLE, examples.TABLE, layers.TABLE)
