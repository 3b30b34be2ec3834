"""Artifacts whatever their kind: folders of them, which kind lies where, and what `pipeline info` shows."""
