"""Transcoders of other tools, read without running anything their files might hold; one module per format."""
