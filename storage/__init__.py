"""Bytes on disk: artifacts, the activation cache, its shuffle and its streams. Knows no torch and no model."""
