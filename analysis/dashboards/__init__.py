"""The contents of a dashboard's pages, computed from published tables, without HTML."""
