"""Transcoders and feature tables in the formats of other tools, one module per format."""
