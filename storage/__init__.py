"""Bytes on disk: artifacts, the activation cache, its shuffle and its streams. Knows no torch and no model."""

if __name__ != "tailrace.storage":
    raise ImportError("import tailrace.storage: this folder has no import name of its own")
