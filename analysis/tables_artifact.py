"""The kind of artifact that ``pipeline analyze`` publishes. Its readers need no torch, which making it does."""

TABLES_KIND = "tables"
